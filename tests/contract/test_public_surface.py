"""The public names are lists: none comes or goes unnoticed, and each leads to what it names."""

import importlib
import inspect

import pytest

import apt_model.optimization.vb_global as vb

SURFACE = {
    "apt_model": ["APTModel", "APTModelConfiguration", "get_device", "get_device_manager"],
    "apt_model.integrations": ["AptFP4Config", "prepare_for_training"],
    "apt_model.optimization": [
        "CloudNPULinear", "FP4Config", "FusedFP4Embedding", "FusedFP4Linear", "VGPUStack",
        "dequantize", "enable_cloud_npu", "get_cloud_npu_manager", "get_device", "get_device_manager", "quantize",
        "tune", "vb_global",
    ],
    "apt_model.core.system": ["Accelerator", "Device", "Presence", "get_device", "get_device_manager", "triton_works"],
}  # fmt: skip
_MODE = "(verbose: bool = True, *, calibrate: bool = False, **options: Any) -> None"
ONE_LINE = {
    "enable": _MODE,
    "enable_balanced_mode": _MODE,
    "enable_speed_mode": _MODE,
    "enable_memory_mode": _MODE,
    "enable_full_optimization": _MODE,
    "disable": "() -> None",
    "is_enabled": "() -> bool",
    "status": "() -> dict[str, typing.Any]",
    "stats": "() -> dict[str, typing.Any]",
    "optimize": "(model: ~M, *, restorable: bool = True) -> ~M",
    "explain": "(model: Any) -> Any",
}
HOMES = {
    "apt_model.modeling.apt_model": ["APTModel", "APTModelConfiguration"],
    "apt_model.trainer.config": ["TrainConfig", "DataConfig", "OptimizerConfig", "GradientConfig"],
    "apt_model.trainer.trainer": ["Trainer", "RunResult"],
    "apt_model.modeling.generation_config": ["GenerationConfig"],
    "apt_model.optimization.fp4_config": ["FP4Config", "QuantizeReport", "Skipped"],
    "apt_model.cloud.manager": ["CloudNPUManager", "CloudReport"],
    "apt_model.cloud.remote_block": ["RemoteBlock"],
    "apt_model.optimization.remote_layers": ["offload_layers", "recall_layers"],
    "apt_model.optimization.tuning": ["TuneReport", "TunedShape"],
    "apt_model.layers.fp4_experts": ["FP4Experts", "pack_experts", "unpack_experts"],
}


@pytest.mark.parametrize("package", SURFACE)
def test_a_packages_names(package):
    module = importlib.import_module(package)
    assert sorted(module.__all__) == SURFACE[package]
    assert set(SURFACE[package]) <= set(dir(module))


@pytest.mark.parametrize(("package", "name"), [(package, name) for package in SURFACE for name in SURFACE[package]])
def test_every_name_leads_to_what_it_names(package, name):
    value = getattr(importlib.import_module(package), name)
    assert value is getattr(importlib.import_module(package), name)
    assert value.__name__.rpartition(".")[2] == name
    assert value.__doc__


def test_a_name_has_one_meaning_wherever_it_is_taken_from():
    for name in {name for names in SURFACE.values() for name in names}:
        owners = [importlib.import_module(package) for package, names in SURFACE.items() if name in names]
        assert len({id(getattr(owner, name)) for owner in owners}) == 1, name


@pytest.mark.parametrize("package", SURFACE)
def test_a_star_import_brings_the_list_and_another_name_is_an_error(package):
    names = {}
    exec(f"from {package} import *", names)  # noqa: S102 - a star import stands only at the top of a module
    assert sorted(names.keys() - {"__builtins__"}) == SURFACE[package]
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'Nonesuch'; it has "):
        importlib.import_module(package).Nonesuch  # noqa: B018


def test_the_one_line_policy():
    functions = {
        name: str(inspect.signature(value))
        for name, value in vars(vb).items()
        if inspect.isfunction(value) and value.__module__ == vb.__name__ and not name.startswith("_")
    }
    assert functions == ONE_LINE


@pytest.mark.parametrize("module", HOMES)
def test_what_guides_and_examples_import_is_there(module):
    for name in HOMES[module]:
        assert hasattr(importlib.import_module(module), name)
