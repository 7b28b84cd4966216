"""Writing artifacts; standard library only. Reading and verifying them is `qcompiler.runtime.artifact`."""

from qcompiler.artifact.manifest import FORMAT, LAYOUT_VERSION, SCHEMA, build_manifest
from qcompiler.artifact.writer import ArtifactWriter

__all__ = ["FORMAT", "LAYOUT_VERSION", "SCHEMA", "ArtifactWriter", "build_manifest"]
