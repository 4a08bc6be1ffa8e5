"""What makes models fit and run fast: a table of names, each loaded on first use. Imports neither torch nor triton."""

from apt_model.core.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "CloudNPULinear": "apt_model.cloud.linear",
        "FP4Config": "apt_model.optimization.fp4_config",
        "FusedFP4Embedding": "apt_model.layers.fp4_embedding",
        "FusedFP4Linear": "apt_model.layers.fp4_linear",
        "VGPUStack": "apt_model.optimization.vgpu_stack",
        "dequantize": "apt_model.optimization.convert",
        "enable_cloud_npu": "apt_model.cloud.manager",
        "get_cloud_npu_manager": "apt_model.cloud.manager",
        "get_device": "apt_model.core.system",
        "get_device_manager": "apt_model.core.system",
        "quantize": "apt_model.optimization.convert",
        "tune": "apt_model.optimization.tuning",
        "vb_global": "apt_model.optimization.vb_global",
    },
)
