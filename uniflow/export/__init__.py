"""A tokenizer for places where this package is not: programs of torch.export, and ONNX."""

from uniflow.export.programs import Decoding, Encoding, export_programs, write_onnx, write_programs

__all__ = ["Decoding", "Encoding", "export_programs", "write_onnx", "write_programs"]
