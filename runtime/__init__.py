"""What executes an artifact: the op library, sessions, generation. Imports numpy and onnxruntime, never torch."""
