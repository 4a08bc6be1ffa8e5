"""What every public option does, as something that can be observed.

`EFFECTS` is the table. A new option needs an entry: another value than its default, and a probe (`probes.py`) that
shows the difference. Both sides of a comparison share the entry's `base`. A new class of options needs its place in
`EFFECTS`, and in `BASE` what makes it small.
"""

from types import MappingProxyType
from typing import Any, NamedTuple

import probes as see
from micro import model_config
from small_models import SHAPE

from apt_model.core.policy import Policy
from apt_model.integrations.hf_config import AptFP4Config
from apt_model.integrations.quantize_config import QuantizeConfig
from apt_model.modeling.configuration import APTModelConfiguration
from apt_model.modeling.generation_config import GenerationConfig
from apt_model.optimization.fp4_config import FP4Config
from apt_model.trainer.config import DataConfig, GradientConfig, OptimizerConfig, TrainConfig


class Effect(NamedTuple):
    """Another value of an option (a function makes one that needs files), and where its effect shows."""

    other: Any
    probe: see.Probe
    base: see.Options = MappingProxyType({})

    def value(self) -> Any:
        """The other value."""
        return self.other() if callable(self.other) else self.other


def run_with(group: str) -> see.Probe:
    """Weights of a run whose options of one group are given."""
    kinds = {"optimizer": OptimizerConfig, "model": APTModelConfiguration}

    def probe(options: see.Options) -> str:
        return see.weights({**BASE[TrainConfig], group: kinds[group](**options)})

    return probe


optimized, trained = run_with("optimizer"), run_with("model")


BASE: dict[type, dict[str, Any]] = {
    APTModelConfiguration: {**SHAPE},
    GenerationConfig: {"max_new_tokens": 12},
    TrainConfig: {
        "steps": 4, "batch_size": 4, "device": "cpu", "precision": "fp32", "tensorboard": "off", "plot": "off",
        "model": model_config(), "data": DataConfig(source=see.texts(), seq_len=16),
    },
    DataConfig: {"source": see.library()},
    OptimizerConfig: {"warmup_steps": 1},
    GradientConfig: {},
    Policy: {"mode": "balanced"},
    FP4Config: {},
    AptFP4Config: {},
    QuantizeConfig: {"device": "cpu"},
}  # fmt: skip
TOO_LARGE = {
    APTModelConfiguration: set(SHAPE),
    TrainConfig: {"steps", "model", "data"},
}
"""Options whose default does not fit a test: the value in `BASE` stands in for it."""

EFFECTS: dict[type, dict[str, list[Effect]]] = {
    APTModelConfiguration: {
        "vocab_size": [Effect(41, see.logits)],
        "d_model": [Effect(64, see.logits)],
        "num_encoder_layers": [Effect(1, see.logits)],
        "num_decoder_layers": [Effect(1, see.logits)],
        "num_heads": [Effect(2, see.logits)],
        "d_ff": [Effect(96, see.logits)],
        "max_seq_len": [Effect(9, see.longest)],
        "decoder_only": [Effect(True, see.shapes)],
        "dropout": [Effect(0.1, see.logits_in_training)],
        "activation": [Effect("swiglu", see.logits)],
        "norm_position": [Effect("post", see.logits)],
        "norm_eps": [Effect(0.01, see.logits)],
        "rope_theta": [Effect(100.0, see.logits)],
        "tie_word_embeddings": [Effect(True, see.shapes), Effect(True, see.logits)],
        "pad_token_id": [Effect(5, see.logits)],
        "bos_token_id": [Effect(7, see.translation)],
        "eos_token_id": [Effect(see.second_token, see.continuation)],
        "use_autopoietic": [Effect(False, see.logits)],
        "sr_ratio": [Effect(2.0, see.shapes)],
        "autopoietic_alpha": [Effect(0.2, see.logits)],
        "use_left_spin": [Effect(False, see.logits)],
        "left_spin_mode": [Effect("trust", see.logits), Effect("guard", see.logits, {"left_spin_tau": 0.3})],
        "left_spin_alpha": [Effect(0.6, see.logits), Effect(0.6, see.logits, {"left_spin_mode": "trust"})],
        "left_spin_tau": [Effect(0.2, see.logits)],
        "left_spin_beta": [Effect(1.0, see.logits)],
        "left_spin_w1": [Effect(2.0, see.logits)],
        "left_spin_w2": [Effect(1.0, see.logits)],
        "left_spin_detach": [Effect(False, see.gradients)],
        "use_dbc_dac": [Effect(False, trained, model_config().to_dict())],
    },
    GenerationConfig: {
        "max_new_tokens": [Effect(5, see.written)],
        "do_sample": [Effect(True, see.written)],
        "temperature": [Effect(0.5, see.written, {"do_sample": True, "seed": 0})],
        "top_k": [Effect(2, see.written, {"do_sample": True, "seed": 0})],
        "top_p": [Effect(0.3, see.written, {"do_sample": True, "seed": 0})],
        "num_beams": [Effect(4, see.written)],
        "length_penalty": [Effect(0.0, see.written, {"num_beams": 4})],
        "seed": [Effect(1, see.written, {"do_sample": True})],
        "use_cache": [Effect(False, see.positions_read)],
    },
    TrainConfig: {
        "out": [Effect("elsewhere", see.files)],
        "resume": [Effect(True, see.second_run)],
        "steps": [Effect(3, see.rows)],
        "batch_size": [Effect(5, see.weights)],
        "grad_accumulation": [Effect(2, see.weights)],
        "seed": [Effect(1, see.weights)],
        "device": [Effect("cuda:63", see.device)],
        "precision": [Effect("fp32", see.on_either_cpu), Effect("bf16", see.on_either_cpu)],
        "compile": [Effect(True, see.graphs_captured)],
        "activation_checkpointing": [Effect(True, see.layers_computed)],
        "log_every": [Effect(1, see.rows)],
        "eval_every": [Effect(2, see.rows)],
        "eval_tokens": [Effect(20, see.rows)],
        "checkpoint_every": [Effect(2, see.files)],
        "keep_checkpoints": [Effect(1, see.files, {"checkpoint_every": 1})],
        "max_skipped": [Effect(2, see.steps_with_nan, {"steps": 12, "log_every": 1})],
        "divergence_margin": [Effect(0.5, see.steps_uphill)],
        "tensorboard": [Effect("off", see.files), Effect("on", see.run_without_extras)],
        "plot": [Effect("off", see.files), Effect("on", see.run_without_extras)],
        "model": [Effect(model_config(d_ff=32), see.weights)],
        "data": [Effect(DataConfig(source=see.texts(), seq_len=15), see.weights)],
        "optimizer": [Effect(OptimizerConfig(lr=0.01), see.weights)],
        "gradient": [Effect(GradientConfig(max_norm=0.1), see.weights)],
    },
    DataConfig: {
        "source": [Effect(see.texts, see.names)],
        "task": [Effect("seq2seq", see.names)],
        "include_tests": [Effect(True, see.names, {"source": "stdlib"})],
        "suffixes": [Effect(".txt", see.names)],
        "holdout": [Effect(0.5, see.names)],
        "tokenizer": [Effect(see.tokenizer_file, see.batch)],
        "seq_len": [Effect(16, see.batch)],
        "target_len": [Effect(8, see.batch, {"task": "seq2seq"})],
    },
    OptimizerConfig: {
        "lr": [Effect(0.01, optimized)],
        "min_lr_ratio": [Effect(0.5, optimized)],
        "warmup_steps": [Effect(3, optimized)],
        "weight_decay": [Effect(0.2, optimized)],
        "beta1": [Effect(0.8, optimized)],
        "beta2": [Effect(0.9, optimized)],
        "eps": [Effect(1e-6, optimized)],
    },
    GradientConfig: {
        "clipping": [Effect("adagc", see.treated), Effect("zclip", see.treated)],
        "max_norm": [Effect(2.0, see.treated)],
        "rank_ratio": [Effect(0.25, see.treated)],
        "row_balance": [Effect(True, see.treated, {"rank_ratio": 0.25})],
        "error_feedback": [Effect(False, see.treated, {"rank_ratio": 0.25})],
        "refresh_steps": [Effect(50, see.treated, {"rank_ratio": 0.25})],
    },
    QuantizeConfig: {
        "weights": [Effect("mxfp4", see.quantized)],
        "layout": [Effect("apt", see.quantized), Effect("compressed-tensors", see.quantized_experts)],
        "skip": [Effect(("layers.0",), see.quantized)],
        "device": [Effect("cuda:63", see.quantized)],
        "dry_run": [Effect(True, see.quantized)],
    },
    Policy: {
        "mode": [
            Effect("balanced", see.decided, {"mode": "speed"}),
            *(Effect(mode, see.decided, {"mode": "balanced"}) for mode in ("speed", "memory", "full")),
        ],
        "precision": [Effect("fp32", see.under_policy), Effect("bf16", see.under_policy)],
        "activation_checkpointing": [Effect("on", see.under_policy), Effect("off", see.under_policy)],
        "fp4": [Effect("on", see.decided), Effect("off", see.decided, {"mode": "memory"})],
        "compile": [Effect("on", see.decided), Effect("off", see.decided, {"mode": "speed", "fp4": "off"})],
        "graphs": [Effect("on", see.decided), Effect("off", see.decided, {"mode": "speed"})],
        "stream": [
            Effect("on", see.decided, {"mode": "memory"}),
            Effect("off", see.decided, {"mode": "memory", "device_mb": 0.01}),
        ],
        "device_mb": [Effect(0.01, see.decided, {"mode": "memory"})],
        "host_mb": [Effect(0.01, see.decided, {"mode": "memory", "device_mb": 0.01})],
        "disk_mb": [Effect(5.0, see.decided, {"mode": "memory", "device_mb": 0.01})],
    },
    FP4Config: {
        "format": [Effect("mxfp4", see.packed)],
        "skip": [Effect(("in_proj", "decoder_layers.1"), see.packed)],
        "embeddings": [Effect(True, see.packed)],
        "activation_dtype": [Effect("fp8", see.packed_for_many_rows)],
    },
    AptFP4Config: {
        "format": [Effect("mxfp4", see.loaded)],
        "modules_to_not_convert": [Effect(("layers.0", "k_proj"), see.loaded)],
        "activation_dtype": [Effect("fp8", see.loaded_for_many_rows)],
    },
}
