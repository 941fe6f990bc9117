"""From prompts to what a published model is given: its family's rules, its tokenizer and its text encoder.

The rules are those of diffusers 0.42 `pipelines/wan/pipeline_wan.py`, `pipelines/cogvideo/pipeline_cogvideox.py`,
`pipelines/animatediff/pipeline_animatediff.py`, `pipelines/text_to_video_synthesis/` and
`pipelines/hunyuan_video/pipeline_hunyuan_video.py`.
"""

import dataclasses
import functools
import gc
import html
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import qvdjax
from models.clip_text import CLIPTextConfig
from models.encoders import EncoderFolder, encoder_shapes, load_encoder, parse_encoder_config
from models.families import family_of, parse_config
from models.pipeline_folder import PipelineFolder
from models.tokenizer import TextTokenizer, Tokens
from qvdjax.checkpoint import CheckpointFolder, Progress, fingerprint
from qvdjax.description import weight_bytes
from qvdjax.errors import UserError
from qvdjax.parallel import bytes_held, free, to_host
from qvdjax.recipes import get

try:
    import ftfy
except ImportError:
    ftfy = None


def clean_prompt(text: str) -> str:
    """As Wan's pipeline cleans a prompt: broken encodings mended (where the package ftfy is installed), HTML's names of
    characters replaced, one space for any white space between words and none around them."""
    if ftfy is not None:
        text = ftfy.fix_text(text)
    # Python's white space but the four separators, which the package regex, used there, does not count as such.
    return re.sub(r"[^\S\x1c-\x1f]+", " ", html.unescape(html.unescape(text))).strip()


@dataclasses.dataclass(frozen=True)
class PromptRule:
    """How a family's prompts are encoded; their length is its configuration's `text_tokens`.

    Attributes:
        encoder: The text encoder's `model_type`.
        clean: What is done to a text first.
        masked: Whether padding is hidden from the encoder, and zeros take its place afterwards.
        template: What a text is put into.
        crop: So many first tokens, those of the template, are left out afterwards.
        output: Which of the encoder's states, None for its usual one.
        pooled: Whether the model is also given each text as one vector, by a second encoder, and which tokens are
            padding; it makes one pass then, without a negative prompt.
    """

    encoder: str
    clean: Callable[[str], str] = str
    masked: bool = False
    template: str = "{}"
    crop: int = 0
    output: str | None = None
    pooled: bool = False


AT_ONCE = 4  # texts
# What HunyuanVideo's language model is asked to do, word by word as it was trained.
DESCRIBE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)

RULES = {
    "wan": PromptRule("umt5", clean=clean_prompt, masked=True),
    "cogvideox": PromptRule("t5"),
    "hunyuanvideo": PromptRule("llama", masked=True, template=DESCRIBE, crop=95, output="skipped", pooled=True),
    "animatediff": PromptRule("clip_text_model"),
    "modelscope": PromptRule("clip_text_model"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedPrompts:
    """Prompts and what the text encoder makes of them, read like a file of text embeddings.

    Attributes:
        path: The pipeline that encoded them.
        prompts, negative_prompt: The texts.
        tensors: `context` (texts, tokens, dim) and `negative_context` (tokens, dim), in the encoder's type; of a model
            that makes one pass `pooled_projections` (texts, dim) and `encoder_attention_mask` (texts, tokens) in the
            place of the latter.
        cut: How many tokens of each text were too many, of those where there were any.
        encoder: The record of what encoded them: `class`, `recipe`, `weight_bytes`, and `peak_bytes`, what its program
            needs of one device by the compiler's account.
    """

    path: Path
    prompts: tuple[str, ...]
    negative_prompt: str
    tensors: Mapping[str, np.ndarray]
    cut: Mapping[str, int]
    encoder: Mapping[str, Any]

    def read(self, name: str) -> np.ndarray:
        """One of the tensors."""
        return self.tensors[name]


@dataclasses.dataclass(frozen=True, eq=False)
class PromptEncoder:
    """A pipeline's tokenizer, text encoder and rules, checked against each other; no weight is read yet.

    Attributes:
        pipeline: Where they are.
        rule: The family's.
        tokenizer: Ready.
        encoder: The text encoder's folder.
        vocabulary: How many tokens it knows.
        length: Tokens of every text, without those of a template.
        second: What makes one vector of a text, where the rule has that.
    """

    pipeline: PipelineFolder
    rule: PromptRule
    tokenizer: TextTokenizer
    encoder: Path
    vocabulary: int
    length: int
    second: "PooledEncoder | None" = None

    @classmethod
    def open(cls, pipeline: PipelineFolder) -> "PromptEncoder":
        """Look at all that encoding needs.

        Raises:
            UserError: A missing or damaged component, a family whose encoder is not here, an encoder of another kind or
                width than the model that is sampled.
        """
        config = CheckpointFolder.open(pipeline.denoiser).config
        family, parsed = family_of(config), parse_config(config)
        if family.name not in RULES:
            raise UserError(
                f"{pipeline.path}: what encodes the prompts of {family.name} is not here",
                remedy=f"sample {pipeline.denoiser} with a file of embeddings (--context)",
            )
        rule, folder = RULES[family.name], pipeline.component("text_encoder")
        opened = EncoderFolder.open(folder)
        encoder = parse_encoder_config(opened.config)
        if opened.config["model_type"] != rule.encoder:
            raise UserError(
                f"{folder} is an encoder of the kind {opened.config['model_type']}, and the texts of {family.name} are"
                f" encoded by {rule.encoder}",
                remedy="put the model's own text encoder there",
            )
        if encoder.width != parsed.text_dim:
            raise UserError(
                f"{folder} makes embeddings of {encoder.width} features, the model in {pipeline.denoiser} takes"
                f" {parsed.text_dim}",
                remedy="put the model's own text encoder there",
            )
        length = parsed.text_tokens + rule.crop
        if encoder.most_tokens is not None and encoder.most_tokens < length:
            raise UserError(
                f"{folder} takes {encoder.most_tokens} tokens, texts of {family.name} have {length}",
                remedy="put the model's own text encoder there",
            )
        tokenizer = TextTokenizer(pipeline.component("tokenizer"))
        second = PooledEncoder.open(pipeline, parsed.pooled_projection_dim) if rule.pooled else None
        return cls(pipeline, rule, tokenizer, folder, encoder.vocab_size, parsed.text_tokens, second)

    def fingerprint(self) -> str:
        """What tells the text encoder's weights from others, see `qvdjax.checkpoint.fingerprint`."""
        opened = EncoderFolder.open(self.encoder)
        return fingerprint(CheckpointFolder(opened.path, opened.config, opened.files))

    def encode(
        self,
        prompts: Sequence[str],
        negative_prompt: str = "",
        *,
        recipe: str | None = None,
        dtype: Any = None,
        mesh: jax.sharding.Mesh | None = None,
        batch: int = AT_ONCE,
        progress: Progress | None = None,
    ) -> EncodedPrompts:
        """Load the text encoder, encode, and free its memory.

        Args:
            prompts: Any texts.
            negative_prompt: What guidance leads away from.
            recipe: Quantize the encoder first, by a recipe that needs no calibration, such as rtn-w8a16.
            dtype, mesh: Of its weights, see `models.load`.
            batch: Texts encoded at once.
            progress: Called with ("reading", bytes done, bytes in all) and ("encoding", texts done, texts in all).

        Raises:
            UserError: See `models.load` and `qvdjax.quantize`; a tokenizer with more tokens than the encoder;
                embeddings that are not finite; a negative prompt for a model that makes one pass.
        """
        if self.second is not None and negative_prompt:
            raise UserError(
                "this model is given its guidance scale as an input and makes one pass, which no other text guides",
                remedy="leave out the negative prompt",
            )
        texts = [*prompts] if self.second is not None else [negative_prompt, *prompts]
        tokens = self._tokens(texts)
        model = self._load(recipe, dtype, mesh, progress)
        encoder = {
            "class": model.config.to_dict()["architectures"][0],
            "recipe": model.recipe_name or None,
            "weight_bytes": weight_bytes(model),
            "peak_bytes": self.peak_bytes(model, min(batch, len(texts))),
        }
        embeddings = np.concatenate(list(self._batches(model, tokens, batch, progress)))
        if self.second is None:
            tensors = {"context": embeddings[1:], "negative_context": embeddings[0]}
        else:
            mask = tokens.mask[:, self.rule.crop :].astype(np.int32)
            pooled = self.second.encode(texts, dtype=dtype, mesh=mesh, progress=progress)
            tensors = {"context": embeddings, "pooled_projections": pooled, "encoder_attention_mask": mask}
        cut = {text: count for text, count in zip(texts, tokens.cut, strict=True) if count}
        return EncodedPrompts(self.pipeline.path, tuple(prompts), negative_prompt, tensors, cut, encoder)

    def encode_each(
        self, texts: Sequence[str], *, dtype: Any = None, batch: int = AT_ONCE, progress: Progress | None = None
    ) -> Iterator[tuple[str, np.ndarray, int]]:
        """As `encode`, for more texts than memory holds: each with its (tokens, dim) and how many tokens were cut.

        The encoder is loaded before the first and freed after the last of them.
        """
        tokens = self._tokens(texts)
        model = self._load(None, dtype, None, progress)
        rows = (row for part in self._batches(model, tokens, batch, progress) for row in part)
        yield from zip(texts, rows, tokens.cut, strict=True)

    def abstract(self, dtype: Any = None) -> nnx.Module:
        """The text encoder as shapes and types, as `encode` loads it."""
        return encoder_shapes(self.encoder, dtype=dtype)

    def peak_bytes(self, model, batch: int) -> int | None:
        """What encoding so many texts at once needs of one device, weights too, by the compiler's account.

        `model` is the encoder, or its shapes and types. None where the backend does not say.
        """
        shape = (batch, self.length + self.rule.crop)
        mask = np.ones(shape, bool) if self.rule.masked else None
        return bytes_held(_embed.lower(model, np.zeros(shape, np.int32), mask, self.rule.output).compile())

    def _tokens(self, texts: Sequence[str]) -> Tokens:
        whole = [self.rule.template.replace("{}", self.rule.clean(text)) for text in texts]
        tokens = self.tokenizer.encode(whole, self.length + self.rule.crop)
        _check_vocabulary(self.tokenizer, tokens, self.encoder, self.vocabulary)
        return tokens

    def _load(self, recipe: str | None, dtype: Any, mesh: jax.sharding.Mesh | None, progress: Progress | None):
        chosen = None if recipe is None else get(recipe)
        if chosen is not None and (chosen.needs_calibration or chosen.training is not None):
            raise UserError(
                f"recipe {recipe} needs a calibration set or training, which text encoders do not get here",
                remedy="choose another, such as rtn-w8a16",
            )
        model = load_encoder(self.encoder, dtype=dtype, mesh=mesh, progress=progress)
        if chosen is not None:
            model = qvdjax.quantize(model, chosen)
            gc.collect()  # modules hold each other: the floats would wait for the collector
        return model

    def _batches(self, model, tokens: Tokens, batch: int, progress: Progress | None) -> Iterator[np.ndarray]:
        """(at most batch, tokens, dim) of one batch after the other; the model's memory is freed at the end.

        The last texts are filled up with the last of them, to compile once.
        """
        count = len(tokens.numbers)
        batch = min(batch, count)
        try:
            for start in range(0, count, batch):
                rows = np.arange(start, start + batch).clip(max=count - 1)
                mask = tokens.mask[rows] if self.rule.masked else None
                embeddings = to_host(_embed(model, tokens.numbers[rows], mask, self.rule.output))[: count - start]
                _check_finite(embeddings, self.encoder)
                if progress:
                    progress("encoding", min(start + batch, count), count)
                yield embeddings[:, self.rule.crop :]
        finally:
            free(model)


@dataclasses.dataclass(frozen=True, eq=False)
class PooledEncoder:
    """CLIP's encoder of texts beside another one: one vector a text.

    Attributes:
        tokenizer: Ready.
        encoder: Its folder.
        vocabulary: How many tokens it knows.
        length: Tokens of every text.
    """

    tokenizer: TextTokenizer
    encoder: Path
    vocabulary: int
    length: int

    @classmethod
    def open(cls, pipeline: PipelineFolder, width: int) -> "PooledEncoder":
        """The pipeline's `text_encoder_2` and `tokenizer_2`, for a model that takes vectors of so many features.

        Raises:
            UserError: A missing or damaged component, an encoder of another kind or width.
        """
        folder = pipeline.component("text_encoder_2")
        config = parse_encoder_config(EncoderFolder.open(folder).config)
        if not isinstance(config, CLIPTextConfig) or config.width != width:
            raise UserError(
                f"{folder} is no CLIP encoder of {width} features", remedy="put the model's own text encoder there"
            )
        tokenizer = TextTokenizer(pipeline.component("tokenizer_2"))
        return cls(tokenizer, folder, config.vocab_size, config.most_tokens)

    def encode(
        self, texts: Sequence[str], *, dtype: Any = None, mesh: jax.sharding.Mesh | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:  # fmt: skip
        """(texts, dim); what is too long is cut. Its memory is free afterwards."""
        tokens = self.tokenizer.encode(texts, self.length)
        _check_vocabulary(self.tokenizer, tokens, self.encoder, self.vocabulary)
        model = load_encoder(self.encoder, dtype=dtype, mesh=mesh, progress=progress)
        try:
            # One text after the other, to compile once for any number of them.
            rows = [to_host(_embed(model, numbers[None], None, "pooled"))[0] for numbers in tokens.numbers]
        finally:
            free(model)
        _check_finite(np.stack(rows), self.encoder)
        return np.stack(rows)


def _check_vocabulary(tokenizer: TextTokenizer, tokens: Tokens, encoder: Path, vocabulary: int) -> None:
    if tokens.numbers.max() >= vocabulary:
        raise UserError(
            f"{tokenizer.path} has more tokens than the {vocabulary} of {encoder}",
            remedy="put the text encoder's own tokenizer there",
        )


def _check_finite(embeddings: np.ndarray, encoder: Path) -> None:
    if not np.isfinite(embeddings.astype(np.float32)).all():
        raise UserError(f"{encoder} makes embeddings that are not finite", remedy="encode with --dtype float32")


@functools.partial(jax.jit, static_argnames="output")
def _embed(model, numbers: jax.Array, mask: jax.Array | None, output: str | None) -> jax.Array:
    embeddings = model(numbers, mask, **({} if output is None else {"output": output}))  # (batch, [tokens,] dim)
    return embeddings if mask is None else jnp.where(mask[..., None], embeddings, 0)
