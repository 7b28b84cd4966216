"""Writing artifacts; no third-party package but numpy. Reading and verifying them is `qcompiler.runtime.artifact`."""

from qcompiler.artifact.manifest import FORMAT, SCHEMA, build_manifest
from qcompiler.artifact.writer import ArtifactWriter

__all__ = ["FORMAT", "SCHEMA", "ArtifactWriter", "build_manifest"]
