"""What the presets of I-LoRA set: the paper, and what two public implementations of it really compute.

Source: section 3.4 of the reference on I-LoRA.
"""

from __future__ import annotations

from typing import Any

__all__ = ["PRESETS"]

_PAPER: dict[str, Any] = {
    "ema_update": "step",
    "consistency_mode": "mse",
    "consistency_rows": "memory",
    "consistency_tokens": "attended",
    "hidden_state_layers": (-1,),
    "ce_reduction": "union_token",
    "ilora_buffer_size": 500,
    "replay_ratio": 1.0,
    "replay_per_task": False,
    "buffer_insert": "task_end",
    "inference_adapter": "stable",
    "alpha": 16.0,
    "lora_dropout": 0.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    "llmcl_effective": {
        **_PAPER,
        "ema_update": "task_end",
        "consistency_mode": "one_sided",
        "consistency_tokens": "all",
        "hidden_state_layers": "all",
        "ce_reduction": "mean_of_means",
        "buffer_insert": "every_step",
        "inference_adapter": "plastic",
        "alpha": 32.0,
        "lora_dropout": 0.1,
        "targets": ("attention",),
    },
    "easycl": {
        **_PAPER,
        "ema_update": "task_end",
        "consistency_rows": "all",
        "consistency_tokens": "all",
        "hidden_state_layers": (-1, -2, -3),
        "ilora_buffer_size": 1_000_000,
        "replay_ratio": 0.3,
        "replay_per_task": True,
        "inference_adapter": "plastic",
        "targets": ("all-linear",),
    },
}
