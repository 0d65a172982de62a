"""A tokenizer for places where this package is not: programs of torch.export, ONNX; its encoder for other packages."""

from uniflow.export.encoders import write_encoder
from uniflow.export.programs import Decoding, Encoding, export_programs, write_onnx, write_programs

__all__ = ["Decoding", "Encoding", "export_programs", "write_encoder", "write_onnx", "write_programs"]
