"""everlora in existing scripts: methods for the Hugging Face Trainer and TRL's SFTTrainer, on PEFT models."""

from __future__ import annotations

from everlora.callbacks.arguments import ILoraArguments
from everlora.callbacks.callback import EverloraCallback
from everlora.callbacks.ewc import ElasticOptions
from everlora.callbacks.o_lora import OrthogonalOptions
from everlora.callbacks.trainer import everlora_trainer

__all__ = ["ElasticOptions", "EverloraCallback", "ILoraArguments", "OrthogonalOptions", "everlora_trainer"]
