"""From a model to one FX graph that passes can work on."""
