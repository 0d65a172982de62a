import shutil

import uniflow_kernels
from uniflow_kernels.diagnosis import DoctorReport


def test_names_the_software_and_every_op():
    report = uniflow_kernels.doctor()
    assert {
        "CUDA part",
        "CPU part",
        "Python",
        "torch",
        "Triton",
        "CUDA",
        "nvcc",
        "GPU",
        "flash-attn",
    } <= report.environment.keys()
    ops = {op.op for op in report.ops}
    assert {"flow_head", "patchify", "interpolate", "velocity_loss", "layerwise_distillation", "attention"} <= ops
    assert {"modulated_norm", "residual_norm", "flow_tangents"} <= ops
    assert all(op.runs and op.why for op in report.ops)
    text = str(report)
    assert all(op in text for op in ops)


def test_the_cpu_part_is_said_to_run_what_it_has(monkeypatch):
    monkeypatch.setattr(uniflow_kernels.diagnosis.torch.cuda, "is_available", lambda: False)
    own = {
        "interpolate",
        "velocity_loss",
        "layerwise_distillation",
        "patchify",
        "unpatchify",
        "seeded_noise",
        "to_images",
    }
    for built in (True, False):
        monkeypatch.setattr(uniflow_kernels.diagnosis.cpu_kernels, "_is_built", lambda built=built: built)
        monkeypatch.setattr(uniflow_kernels.diagnosis, "_cpu_part", lambda: "")
        served = {op.op for op in uniflow_kernels.doctor().ops if op.runs == "the CPU part"}
        assert served == (own if built else set())


def test_works_without_nvcc_and_triton(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)

    def nothing(name):
        raise uniflow_kernels.diagnosis.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(uniflow_kernels.diagnosis.importlib.metadata, "version", nothing)
    report = uniflow_kernels.doctor()
    assert isinstance(report, DoctorReport)
    assert report.environment["nvcc"] == "not on the PATH"
    assert report.environment["Triton"] == "not installed"


def test_the_function_is_not_shadowed_by_a_module():
    import uniflow_kernels.diagnosis

    assert callable(uniflow_kernels.doctor)
    assert callable(uniflow_kernels.doctor)
