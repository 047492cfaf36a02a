"""Hugging Face encoders as backbones."""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from everlora.backbones.architectures import ARCHITECTURES, Architecture, known_projections, known_targets
from everlora.backbones.base import Backbone
from everlora.backbones.images import ImageInputs, ImageTransform
from everlora.backbones.pooling import pool, pooled_width
from everlora.backbones.texts import TextInputs
from everlora.errors import ModelError, OptionError
from everlora.lowrank.fused import slice_names

__all__ = [
    "HuggingFaceBackbone",
    "accepts",
    "depth_of",
    "guarded_load",
    "hidden_size",
    "linear_names",
    "load_huggingface",
    "quiet_transformers",
]

logger = logging.getLogger("everlora.backbones")

_ROWS_IN_A_GROUP = 8
_TEXT_ARGUMENTS = ("input_ids", "attention_mask", "token_type_ids")
_STAGES = frozenset({"depths", "hidden_sizes"})
_UNKNOWN = Architecture((), "mean", num_prefix=0)
_DEFAULT_MAX_LENGTH = 512
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# What transformers raises for a broken or unsuitable folder.
_LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, SafetensorError)


class HuggingFaceBackbone(Backbone):
    """An encoder of transformers with pooled features.

    Args:
        model: the encoder.
        inputs: encodes and collates its data.
        facts: the entry of the architecture's table.
        interpolate: ask the model to interpolate its position embeddings, for images of another size.
        **names: `source`, `folder`, `architecture`, `pooling`, `feature_layers`, handed to `Backbone`.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: ImageInputs | TextInputs,
        *,
        facts: Architecture,
        interpolate: bool = False,
        **names: Any,
    ) -> None:
        width = pooled_width(names["pooling"], hidden_size(model), names.get("feature_layers", 1))
        super().__init__(model, inputs, feature_dim=width, **names)
        self.dtype = next(model.parameters()).dtype
        self.num_prefix = facts.num_prefix + _num_registers(model)
        self.interpolate = interpolate
        self._preferred_targets = facts.targets

    @property
    def default_targets(self) -> tuple[str, ...]:
        """Last name components of the key and value projections.

        Raises:
            TargetError: none of the known names is present.
        """
        return known_targets(linear_names(self.model), self._preferred_targets)

    def attention_targets(self, *roles: str) -> tuple[str, ...]:
        """Last name components of the projections with the given roles: `query`, `key`, `value`.

        Raises:
            TargetError: none of the known names is present, or the projections are fused into one layer that
                cannot be taken apart.
        """
        return known_projections(linear_names(self.model), roles, self._preferred_targets)

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """Compute pooled features, `(n, feature_dim)` float32."""
        if self.modality == "image":
            extra = {"interpolate_pos_encoding": True} if self.interpolate else {}
            return self._pooled({"pixel_values": batch["pixel_values"].to(self.dtype), **extra}, mask=None)
        texts = {name: batch[name] for name in _TEXT_ARGUMENTS if name in batch}
        # Without gradients, batches come sorted by length and forward hooks want a batch whole. A training batch is
        # drawn at random, since rows of like length are too often rows of one class, so it is sorted here.
        return self._by_length(texts) if torch.is_grad_enabled() else self._text_features(texts)

    def _text_features(self, texts: dict[str, Tensor]) -> Tensor:
        return self._pooled(texts, mask=texts["attention_mask"])

    def _pooled(self, arguments: dict[str, Any], mask: Tensor | None) -> Tensor:
        extra = {"output_hidden_states": True} if self.feature_layers > 1 else {}
        outputs = self.model(**arguments, **extra)
        return pool(outputs, self.pooling, mask=mask, num_prefix=self.num_prefix, layers=self.feature_layers)

    def _by_length(self, texts: dict[str, Tensor]) -> Tensor:
        """Compute the features of a few groups of rows of like length, each cut to its longest: less padding."""
        lengths = texts["attention_mask"].sum(dim=1)
        order = lengths.argsort(stable=True)
        parts = []
        for rows in torch.chunk(order, max(1, len(order) // _ROWS_IN_A_GROUP)):
            longest = int(lengths[rows].max())
            parts.append(self._text_features({name: tensor[rows, :longest] for name, tensor in texts.items()}))
        return torch.cat(parts)[order.argsort()]


def load_huggingface(
    folder: Path,
    *,
    source: str,
    pooling: str,
    normalise: bool,
    dtype: torch.dtype,
    max_length: int | None,
    image_size: int | None,
    feature_layers: int,
) -> HuggingFaceBackbone:
    """Load an encoder from a local folder; see `everlora.backbones.load_backbone`.

    Raises:
        ModelError: the folder cannot be loaded, or lacks some of the encoder's weights.
        OptionError: an option does not fit the modality of the model.
    """
    with quiet_transformers():
        config = guarded_load(folder, transformers.AutoConfig.from_pretrained, folder, local_files_only=True)
        architecture = str(config.model_type)
        facts = ARCHITECTURES.get(architecture, _UNKNOWN)
        chosen = _choose_pooling(folder, facts) if pooling == "auto" else pooling
        model = _load_encoder(folder, config, facts, pooler=chosen == "pooler", dtype=dtype)
    _check_feature_layers(feature_layers, model.config, chosen, source)
    inputs: ImageInputs | TextInputs
    interpolate = False
    if model.main_input_name == "pixel_values":
        if max_length is not None:
            raise OptionError(f"expected no max_length for the image model {source}, found {max_length}; leave it out")
        inputs = ImageInputs(_image_transform(folder, model.config, image_size, normalise))
        interpolate = _needs_interpolation(model, inputs.transform.size, source)
    elif image_size is not None:
        raise OptionError(f"expected no image_size for the text model {source}, found {image_size}; leave it out")
    else:
        inputs = _text_inputs(folder, model.config, facts, max_length)
    return HuggingFaceBackbone(
        model,
        inputs,
        facts=facts,
        interpolate=interpolate,
        source=source,
        folder=folder,
        architecture=architecture,
        pooling=chosen,
        feature_layers=feature_layers,
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars, load reports and notices of transformers; errors still raise."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def guarded_load(folder: Path, load: Any, *args: Any, **options: Any) -> Any:
    """Call what loads a part of a folder; whatever it raises becomes one sentence.

    Raises:
        ModelError: it raised one of the many errors of transformers for a broken or unsuitable folder.
    """
    try:
        return load(*args, **options)
    except _LOADING_ERRORS as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise ModelError(
            f"expected a model that transformers {transformers.__version__} can load in {folder}, found: {reason}; "
            "check the folder or name another model"
        ) from error


def _load_encoder(folder: Path, config: Any, facts: Architecture, *, pooler: bool, dtype: torch.dtype) -> Any:
    loader: Any = getattr(transformers, facts.loader)
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "output_loading_info": True}
    options["use_safetensors"] = True  # a pickle is never read
    if facts.loader == "AutoModel":
        options["config"] = config
        model_class = guarded_load(folder, transformers.MODEL_MAPPING.__getitem__, type(config))
        if not isinstance(model_class, tuple) and accepts(model_class, "add_pooling_layer"):
            options["add_pooling_layer"] = pooler
    with torch.random.fork_rng(devices=[]):  # starting values of absent layers must not move the caller's randomness
        model, info = guarded_load(folder, loader.from_pretrained, folder, **options)
    missing = sorted(name for name in info["missing_keys"] if pooler or not name.startswith("pooler."))
    if missing:
        raise ModelError(
            f"expected all weights of {type(model).__name__} in {folder}, found {len(missing)} missing, first "
            f"{missing[0]}; use another folder" + (" or another pooling" if pooler else "")
        )
    return model


def linear_names(model: nn.Module) -> list[str]:
    """Qualified names of all linear layers of a network, those inside adapted ones and slices of fused ones too."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    # An adapted layer keeps its frozen linear layer inside, one name component deeper.
    adapted = [name.removesuffix(".base") for name in names if name.endswith(".base")]
    return [*names, *adapted, *slice_names(model)]


def accepts(function: Any, name: str) -> bool:
    """Whether a function names the argument `name`."""
    return name in inspect.signature(function).parameters


def hidden_size(model: Any) -> int:
    """Width of the hidden states, that of the last stage where they differ.

    Raises:
        ModelError: the model's config does not say.
    """
    config = model.config
    # Convolutional networks list one width for each stage.
    width = getattr(config, "hidden_size", None) or getattr(config, "hidden_sizes", [None])[-1]
    if not isinstance(width, int):
        raise ModelError(f"expected hidden_size in the config of {type(model).__name__}, found none; use another model")
    return width


def depth_of(folder: Path, pooling: str) -> int:
    """How many of an encoder's layers can be pooled: 1 if they differ in width, or the pooling reads only the last.

    Raises:
        ModelError: the folder cannot be read.
    """
    with quiet_transformers():
        config = guarded_load(folder, transformers.AutoConfig.from_pretrained, folder, local_files_only=True)
        facts = ARCHITECTURES.get(str(config.model_type), _UNKNOWN)
        return _depth(config, _choose_pooling(folder, facts) if pooling == "auto" else pooling)


def _depth(config: Any, pooling: str) -> int:
    depth = getattr(config, "num_hidden_layers", None)
    # Networks of several stages list these, and are wider in each.
    alike = isinstance(getattr(config, "hidden_size", None), int) and not _STAGES & set(vars(config))
    return depth if alike and isinstance(depth, int) and pooling != "pooler" else 1


def _check_feature_layers(count: int, config: Any, pooling: str, source: str) -> None:
    most = _depth(config, pooling)
    if count > most:
        why = f"pooling {pooling!r} of its {most} layer{'s' * (most > 1)} gives no more"
        raise OptionError(
            f"expected feature_layers of at most {most} for {source}, found {count}: {why}; lower it or leave it out"
        )


def _num_registers(model: Any) -> int:
    return int(getattr(model.config, "num_register_tokens", 0) or 0)


def _choose_pooling(folder: Path, facts: Architecture) -> str:
    """Pooling of the architecture, unless a sentence encoder says how it was trained."""
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return facts.pooling
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"expected readable JSON in {path}, found {error}; repair it or choose pooling") from error
    return "cls" if settings.get("pooling_mode_cls_token") else "mean"


def _image_transform(folder: Path, config: Any, image_size: int | None, normalise: bool) -> ImageTransform:
    native = getattr(config, "image_size", None)
    native = native if isinstance(native, int) else None
    if (folder / "preprocessor_config.json").is_file():
        with quiet_transformers():
            load = transformers.AutoImageProcessor.from_pretrained
            processor = guarded_load(folder, load, folder, local_files_only=True, trust_remote_code=False)
        transform = ImageTransform.from_processor(processor, native)
    else:
        logger.info("no preprocessor_config.json in %s: pixels are scaled to [-1, 1]", folder)
        transform = ImageTransform(size=native, mean=_HALF[0], std=_HALF[1])
    if image_size is not None:
        transform = transform.with_size(image_size)
    return transform if normalise else transform.without_normalisation()


def _needs_interpolation(model: Any, size: int | None, source: str) -> bool:
    native = getattr(model.config, "image_size", None)
    if not isinstance(native, int) or size in (None, native):
        return False
    if accepts(model.forward, "interpolate_pos_encoding"):
        return True
    # Several architectures interpolate by themselves; the others must be refused before training starts.
    with torch.no_grad():
        parameter = next(model.parameters())
        probe = torch.zeros(1, 3, size or native, size or native, dtype=parameter.dtype, device=parameter.device)
        try:
            model(pixel_values=probe)
        except (ValueError, RuntimeError) as error:
            raise OptionError(
                f"expected image_size {native} for {source}, found {size}; leave image_size out"
            ) from error
    return False


def _text_inputs(folder: Path, config: Any, facts: Architecture, max_length: int | None) -> TextInputs:
    with quiet_transformers():
        load = transformers.AutoTokenizer.from_pretrained
        tokenizer = guarded_load(folder, load, folder, local_files_only=True, trust_remote_code=False)
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and facts.offset_positions:
        limit -= int(config.pad_token_id or 0) + 1
    if not isinstance(limit, int) or limit < 1:
        limit = None
    if max_length is not None and limit is not None and max_length > limit:
        raise OptionError(f"expected max_length of at most {limit}, the positions of the model, found {max_length}")
    return TextInputs(tokenizer, max_length or _usual_length(folder, tokenizer, limit))


def _usual_length(folder: Path, tokenizer: Any, limit: int | None) -> int:
    """Length a sentence encoder was trained with, else what tokenizer and positions allow."""
    bounds = [_DEFAULT_MAX_LENGTH] if limit is None else [limit]
    bounds.append(int(min(tokenizer.model_max_length, 1 << 20)))
    path = folder / "sentence_bert_config.json"
    if path.is_file():
        try:
            stated = json.loads(path.read_text(encoding="utf-8")).get("max_seq_length")
        except (OSError, ValueError) as error:
            raise ModelError(f"expected readable JSON in {path}, found {error}; repair it") from error
        bounds += [stated] if isinstance(stated, int) and stated > 2 else []
    return min(bounds)
