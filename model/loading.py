"""From a name to an engine: embedded checkpoints, folders, hub ids; where and how it runs, chosen and explained.

Whatever is wrong with a name, a folder or a download becomes one clear sentence before weights are read. Only
safetensors are opened and no code of a checkpoint is ever run. Knows nothing about prompts, answers or the page.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read by huggingface_hub when it is imported below

import psutil
import torch
from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import get_session
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig, PreTrainedConfig

from model.errors import UserError
from model.families import Family, detect
from model.images import DEFAULT_LIMITS

if TYPE_CHECKING:
    from model.engine import Engine

logger = logging.getLogger(__name__)

CHECKPOINTS = Path(__file__).resolve().parent.parent / "assets" / "checkpoints"
DEFAULT = "hires"  # what "embedded" means
EMBEDDED = "embedded"
EMBEDDED_DEFAULT = f"{EMBEDDED}/{DEFAULT}"
LAB = "lab-"  # what the names of the lab's variants begin with
NEEDED = {  # beside config and weights: what it is -> the files that can hold it; transformers would go on without them
    "tokenizer": ("tokenizer.json", "vocab.json", "tokenizer.model"),
    "image processor": ("preprocessor_config.json", "processor_config.json"),
}
DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # all that a checkpoint needs
SMALL = 2**30  # bytes in float32; a model below it runs in float32 on a GPU too, where that costs nothing
SPLIT = "split"  # as a device: accelerate spreads the model's layers over all GPUs
KEPT_WHOLE = (  # never quantised: what the families' models call their vision side, and their heads
    *("visual", "vision_tower", "vision_model", "multi_modal_projector", "layerwise_projectors", "spatial_projectors"),
    "lm_head",
)
HEADROOM = 1.1  # memory needed to load a model, as a multiple of its weights

Progress = Callable[[float, str], None]  # (0..1, what is being done)


# ---- names


def embedded_names() -> list[str]:
    """The checkpoints that come with the app, as 'embedded/<name>': the default first, the lab's variants last."""
    found = sorted(path.parent.name for path in CHECKPOINTS.glob("*/config.json"))
    ordered = sorted(found, key=lambda name: (name != DEFAULT, name.startswith(LAB)))
    return [f"{EMBEDDED}/{name}" for name in ordered]


def canonical(name: str) -> str:
    """One spelling per model: 'embedded' becomes 'embedded/hires'. UserError for an empty or unknown name."""
    name = str(name).strip()
    if not name:
        raise UserError(f"The model's name is empty; use one of {', '.join(embedded_names())}, a hub id or a folder.")
    if name == EMBEDDED:
        name = EMBEDDED_DEFAULT
    if name.startswith(f"{EMBEDDED}/") and name not in embedded_names():
        raise UserError(f"There is no model {name}; embedded are {', '.join(embedded_names()) or 'none'}.")
    return name


def check(name: str) -> None:
    """UserError for all that can be known to be wrong with a model before its weights are downloaded or read."""
    name = canonical(name)
    folder = _folder(name)
    if folder is None:
        with _hub_errors(name):
            check_type(Path(hf_hub_download(name, "config.json")), name)
    else:
        family = check_type(folder / "config.json", name)
        check_files(folder, name, lacks=family.lacks)


def find(name: str, progress: Progress | None = None) -> Path:
    """The folder of a model: of the app, of the user, or downloaded from the hub into its cache; else UserError."""
    name = canonical(name)
    return _folder(name) or _download(name, progress)


def _folder(name: str) -> Path | None:
    """The folder that a name means, None where it is a hub id; UserError where it is neither."""
    if name.startswith(f"{EMBEDDED}/"):
        return CHECKPOINTS / name.removeprefix(f"{EMBEDDED}/")
    folder = Path(name).expanduser()
    if folder.exists() or name.startswith((".", "~", os.sep)) or name.count("/") > 1 or "\\" in name:
        if folder.is_file():
            raise UserError(f"{name} is a file; give the model's folder, with its config.json.")
        if not folder.is_dir():
            raise UserError(f"There is no folder {name}.")
        return folder
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        return None
    raise UserError(
        f"“{name}” is no model: use {' or '.join(embedded_names()[:1] or [EMBEDDED])}, a hub id such as "
        "Qwen/Qwen3-VL-2B-Instruct, or a folder."
    )


# ---- the hub


def _download(hub_id: str, progress: Progress | None) -> Path:
    """The cached snapshot of a hub model, downloaded where it is not there; its type and size are looked at first."""
    with _hub_errors(hub_id):
        cached = not _hub_answers()  # then what is in the cache must do
        check_type(Path(hf_hub_download(hub_id, "config.json", local_files_only=cached)), hub_id)
        if cached:
            return Path(snapshot_download(hub_id, allow_patterns=DOWNLOADED, local_files_only=True))
        files = snapshot_download(hub_id, allow_patterns=DOWNLOADED, dry_run=True)
        if not any(file.filename.endswith(".safetensors") for file in files):
            raise UserError(f"{hub_id} has no safetensors files; other formats can hold code and are not opened.")
        missing = sum(file.file_size or 0 for file in files if file.will_download)
        _check_disk(missing, hub_id)
        bar = _bar(missing, hub_id, progress) if progress and missing else None
        return Path(snapshot_download(hub_id, allow_patterns=DOWNLOADED, tqdm_class=bar))


def _hub_answers() -> bool:
    """Whether the hub can be reached at all, in one attempt: its library tries six times in 25 seconds."""
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # of whichever HTTP library the hub's own is built on
        logger.info("no answer from %s: %s", constants.ENDPOINT, error)
        return False
    return True


@contextmanager
def _hub_errors(hub_id: str) -> Iterator[None]:
    """What the hub's library raises, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except (OSError, HFValidationError, HfHubHTTPError, EntryNotFoundError) as error:
        raise UserError(hub_sentence(hub_id, error)) from error


def hub_sentence(hub_id: str, error: Exception) -> str:
    """What went wrong with the hub, in one sentence for the person who asked for this model."""
    answered = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
    status = getattr(getattr(answered, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        return f"{hub_id} is gated: accept its terms on the hub, then set HF_TOKEN or run `hf auth login`."
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        return f"There is no model {hub_id} on the hub, or it is private (then set HF_TOKEN); check the spelling."
    if isinstance(error, HFValidationError):
        return f"“{hub_id}” is not a hub id (owner/name)."
    if getattr(error, "errno", None) in (28, 122):  # ENOSPC, EDQUOT
        return (
            f"No disk space left for {hub_id} in {constants.HF_HUB_CACHE}; free some, or set HF_HOME to another disk."
        )
    if isinstance(error, PermissionError):
        return f"The cache {constants.HF_HUB_CACHE} cannot be written to; set HF_HOME to a folder that can."
    if (
        isinstance(error, LocalEntryNotFoundError) and status is None
    ):  # also raised for a file that the cache lacks, without a network
        return f"The hub cannot be reached and {hub_id} is not in the cache; check the network, or give a folder."
    if status not in (None, 404):
        return f"The hub has trouble with {hub_id} (it answered {status}); try again later, or give a folder."
    if isinstance(error, EntryNotFoundError):
        return f"{hub_id} has no config.json, so it is not a model in the transformers format."
    words = " ".join(str(error).split())[:150]
    return f"{hub_id} could not be downloaded: {words or type(error).__name__}. Try again, or give a folder."


def _check_disk(needed: int, hub_id: str) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{hub_id} needs {gigabytes(needed)} more on disk and {cache} has {gigabytes(free)} free; "
            "free some, or set HF_HOME to another disk."
        )


def _bar(total: int, hub_id: str, progress: Progress) -> type[tqdm]:
    """A tqdm class that draws nothing and reports the bytes that have arrived.

    Files arrive in several threads: what is counted and what is reported are one act, so reports never go back.
    """
    reporting = threading.Lock()

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "file": open(os.devnull, "w")})

        def update(self, n=1):
            with reporting:
                super().update(n)
                if self.unit == "B":
                    done = min(self.n / total, 1.0)
                    progress(done * 0.9, f"downloading {hub_id}: {gigabytes(self.n)} of {gigabytes(total)}")

        def close(self):
            super().close()
            self.fp.close()

    return Bar


# ---- a folder, looked at before it is loaded


def check_type(config_file: Path, name: str) -> type[Family]:
    """The family that runs this checkpoint; UserError unless config.json is readable and some family does."""
    try:
        raw = json.loads(config_file.read_text(encoding="utf-8"))
        config = PreTrainedConfig.from_dict({key: value for key, value in raw.items() if value is not None})
        config.model_type = str(raw["model_type"])
    except FileNotFoundError as error:
        raise UserError(f"{name} has no config.json, so it is not a model in the transformers format.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"The config.json of {name} cannot be used: it is damaged or names no model_type.") from error
    return detect(config)


def check_files(folder: Path, name: str, unused: Iterable[str] = (), lacks: Iterable[str] = ()) -> int:
    """The number of parameters; UserError where a file is missing or cut off, or weights are not safetensors.

    unused: patterns of weight names that are not loaded and not counted (`Family.unused_weights`); lacks: what of
    NEEDED its family comes without (`Family.lacks`).
    """
    for what, files in NEEDED.items():
        if what not in lacks and not any((folder / file).is_file() for file in files):
            raise UserError(f"{name} has no {what} ({' or '.join(files)}); download it again.")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"The file {index.name} of {name} is damaged; download it again.") from error
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise UserError(
                f"{name} lacks {missing[0]} ({len(missing)} of {len(files)} weight files); download it again."
            )
        paths = [folder / file for file in files]
    else:
        paths = [folder / "model.safetensors"]
        if not paths[0].is_file():
            pickles = sorted(
                [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.ckpt")]
            )
            other = f" {pickles[0].name} is a pickle, which can run code, and is not opened." if pickles else ""
            raise UserError(f"{name} has no model.safetensors.{other} Give a folder with safetensors.")
    skipped = re.compile("|".join(unused) or r"(?!)")  # (?!) matches nothing
    parameters = 0
    for path in paths:
        try:
            with safe_open(
                path, framework="pt"
            ) as file:  # reads the header only, and compares it with the file's length
                used = [key for key in file.keys() if not skipped.search(key)]
                parameters += sum(math.prod(file.get_slice(key).get_shape()) for key in used)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path.name} of {name} is cut off or damaged; download it again.") from error
    return parameters


# ---- device, number format, attention; each choice comes with its reason


def choose_device(wanted: str | None = None) -> tuple[torch.device, str]:
    """(device, why): a CUDA GPU where there is a working one, else the CPU; or what was asked for, if it is there."""
    if wanted in (None, "", "auto"):
        if not torch.cuda.is_available():
            return torch.device("cpu"), "cpu: no CUDA GPU was found"
        try:
            torch.zeros(1, device="cuda")
        except RuntimeError as error:
            return torch.device("cpu"), f"cpu: the CUDA GPU does not work ({str(error).splitlines()[0]})"
        return torch.device("cuda"), f"cuda: {torch.cuda.get_device_name()} was found"
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"The device “{wanted}” cannot be used here; leave --device out or use one of {_devices()}."
        ) from error
    return device, f"{device}: asked for"


def _devices() -> str:
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return ", ".join(["cpu", *cuda, *mps])


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTISED = {"int8": 1.1, "nf4": 0.7}  # by bitsandbytes -> bytes of a weight, a little more than of its own
DECODE = ("auto", "plain", "compiled")
DTYPES_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def choose_dtype(wanted: str | None, device: torch.device, parameters: int) -> tuple[torch.dtype, str]:
    """(number format, why) for a model of that many parameters on this device."""
    if wanted not in (None, "", "auto"):
        name = DTYPES_SHORT.get(wanted, wanted)
        if name not in DTYPES:
            known = ", ".join([*DTYPES, *QUANTISED])
            raise UserError(f"The number format “{wanted}” is not known; use one of {known}.")
        return DTYPES[name], f"{name}: asked for"
    if device.type == "cpu":
        return torch.float32, "float32: exact, and the fastest on most CPUs"
    if parameters * 4 < SMALL:
        return torch.float32, "float32: the model is small"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "bfloat16: the GPU supports it"
    return torch.float32, f"float32: {device.type} has no bfloat16 here"


def check_split() -> str:
    """Why a model is spread; UserError where there is no GPU to spread it over."""
    count = torch.cuda.device_count() if choose_device()[0].type == "cuda" else 0
    if not count:
        raise UserError(f"{SPLIT} spreads a model over the GPUs, and none was found; leave --device out, or use cpu.")
    return f"{SPLIT}: spread over {count} GPU{'s' * (count > 1)}, and the CPU for what does not fit there"


def quantised(name: str, device: torch.device) -> tuple[dict, str]:
    """(what from_pretrained takes, why) of a format of bitsandbytes; UserError where that is not installed.

    Only the LLM's layers are quantised: the vision tower, its mergers and the head stay, and with them the stacks.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"The number format {name} needs the package bitsandbytes, which is not installed (pip install "
            f"bitsandbytes); without it use one of {', '.join(DTYPES)}."
        )
    if device.type != "cuda":
        raise UserError(f"The number format {name} runs on a CUDA GPU, not on {device}; use float32.")
    how = {"load_in_8bit": True} if name == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = BitsAndBytesConfig(**how, bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=list(KEPT_WHOLE))
    return {"quantization_config": config}, f"{name}: asked for; layers of the LLM, all else in bfloat16"


def choose_attention(wanted: str | None, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """("sdpa", "flash" or "eager", why) of the LLM's attention; UserError where what was asked for cannot be had."""
    if wanted in (None, "", "auto"):
        own = ", which has flash kernels of its own" if device.type == "cuda" else " own"
        return "sdpa", f"sdpa attention: PyTorch's{own}"
    if wanted not in ("sdpa", "flash", "eager"):
        raise UserError(f"The attention “{wanted}” is not known; use one of auto, sdpa, flash, eager.")
    if wanted == "flash":
        if find_spec("flash_attn") is None:
            raise UserError(
                "Flash attention needs the package flash-attn, which is not installed (pip install flash-attn); "
                "sdpa has flash kernels of its own."
            )
        if device.type != "cuda" or dtype == torch.float32:
            number = str(dtype).removeprefix("torch.")
            raise UserError(f"Flash attention runs on a CUDA GPU in bfloat16 or float16, not on {device} in {number}.")
        return "flash", "flash attention: asked for; where steps are shared or compiled, and masked therefore, sdpa"
    return wanted, f"{wanted} attention: asked for" + ("; slow, all scores at once" if wanted == "eager" else "")


def check_decode(wanted: str | None) -> None:
    """UserError for a way to decode that there is not."""
    if wanted not in (None, *DECODE):
        raise UserError(f"The way to decode “{wanted}” is not known; use one of {', '.join(DECODE)}.")


def free_memory(device: torch.device) -> int:
    """Bytes that are free on this device; on a GPU also what torch holds there and does not use."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def check_memory(needed: float, device: torch.device, name: str, split: bool = False) -> None:
    """UserError where the weights alone do not fit into the memory that is free; split: on all GPUs and the CPU."""
    free, where = free_memory(device), str(device)
    if split:
        gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        free, where = sum(map(free_memory, [*gpus, torch.device("cpu")])), "all devices"
    if needed * HEADROOM > free:
        raise UserError(
            f"{name} needs {gigabytes(needed * HEADROOM)} of memory on {where} and {gigabytes(free)} are free; "
            f"use a smaller model, another --device, --dtype bfloat16, or {' or '.join(QUANTISED)} with bitsandbytes."
        )


def gigabytes(n: float) -> str:
    """Bytes in words: '4.3 GB', '12 MB'."""
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB" if n >= 1e6 else f"{n / 1e3:.0f} kB"


# ---- the engine


def load(
    name: str, *, device: str | None = None, dtype: str | None = None, attention: str | None = None,
    decode: str | None = None, brief: bool = False, progress: Progress | None = None,
) -> Engine:  # fmt: skip
    """The engine of a model: "embedded", "embedded/<name>", a hub id or a folder; UserError for what is wrong with it.

    device ("cpu", "cuda", "cuda:1" …, or "split" over all GPUs), dtype ("float32", "bfloat16", "float16", or with
    bitsandbytes "int8", "nf4"), attention ("sdpa", "flash", "eager") and decode ("plain", "compiled") are chosen where
    they are not given; `engine.reasons` says why. brief: for a few answers, for which compiling takes too long.
    """
    name = canonical(name)
    folder = find(name, progress)
    family = check_type(folder / "config.json", name)
    parameters = check_files(folder, name, family.unused_weights(), family.lacks)
    placing: dict = {}
    if device == SPLIT:
        why_device, chosen = check_split(), torch.device("cuda", 0)
        placing["device_map"] = "auto"
    else:
        chosen, why_device = choose_device(device)
    if dtype in QUANTISED:
        number, per_weight = torch.bfloat16, QUANTISED[dtype]
        config, why_dtype = quantised(dtype, chosen)
        placing |= config
    else:
        number, why_dtype = choose_dtype(dtype, chosen, parameters)
        per_weight = number.itemsize
    check_memory(parameters * per_weight, chosen, name, split=device == SPLIT)
    choose_attention(attention, chosen, number)  # what cannot be had is said before the weights are read
    check_decode(decode)
    if progress:
        progress(0.9, f"loading the weights of {name}")
    try:
        reasons = (why_device, why_dtype)
        engine = family.build(str(folder), chosen, number, name=name, reasons=reasons, placing=placing)
    except UserError:
        raise
    except Exception as error:
        if name.startswith(f"{EMBEDDED}/"):  # not the user's checkpoint: our own mistake, to be seen in full
            raise
        words = " ".join(str(error).split())[:200]
        raise UserError(f"{name} cannot be loaded: {words or type(error).__name__}.") from error
    held = sum(parameter.numel() for parameter in engine.model.parameters())  # shared ones once, as in the files
    held -= engine.adapter.borrowed
    if parameters < held:
        raise UserError(f"{name} lacks {held - parameters:,} of the model's {held:,} parameters; download it again.")
    make_ready(engine, attention, decode, brief, progress)
    for line in introduction(engine):
        logger.info(line)
    if progress:
        progress(1.0, f"{name} is ready")
    return engine


def make_ready(
    engine: Engine, attention: str | None, decode: str | None, brief: bool = False, progress: Progress | None = None
) -> None:
    """Chooses how an engine computes attention and decodes, and compiles what is to be compiled."""
    engine.attend_by(attention)
    engine.decode_by(decode, brief=brief)
    if engine.compiled is not None:
        if progress:
            progress(0.95, f"compiling the decoding of {engine.name}, which takes a minute or two")
        engine.warm_up()


def introduction(engine: Engine) -> list[str]:
    """What was loaded, where it runs and why, and what its config gets wrong: lines for a log."""
    head = f"{engine.name}: {gigabytes(engine.memory_bytes)}, {'; '.join(engine.reasons)}"
    return [head, *(f"warning: {warning}" for warning in engine.warnings)]


class Zoo:
    """The models that one run of the app offers, each loaded once, when it is first asked for. Thread-safe.

    offered: names, the first one the default. max_memory: bytes that one request may take beside the weights. how:
    device, dtype, attention and decode as in `load`. A load that failed leaves nothing behind and can be tried again.
    """

    def __init__(self, offered: Iterable[str], *, max_memory: int = DEFAULT_LIMITS.max_memory, **how: str | None):
        self.offered: tuple[str, ...] = tuple(dict.fromkeys(canonical(name) for name in offered))
        self._how, self._max_memory = how, max_memory
        self._engines: dict[str, Engine] = {}
        self._loading = threading.Lock()  # one load at a time: from_pretrained changes torch's default dtype meanwhile

    @property
    def default(self) -> str:
        """The model that a visitor starts with."""
        return self.offered[0]

    def get(self, name: str, progress: Progress | None = None) -> Engine:
        """The engine of an offered model, loaded now if it is not yet; UserError for a name that is not offered."""
        name = EMBEDDED_DEFAULT if name == EMBEDDED else name
        if name not in self.offered:
            raise UserError(
                f"The model “{str(name)[:80]}” is not offered here; choose one of {', '.join(self.offered)}."
            )
        if name not in self._engines:
            with self._loading:
                if name not in self._engines:
                    engine = load(name, **self._how, progress=progress)
                    engine.max_memory = self._max_memory
                    self._engines[name] = engine
        return self._engines[name]

    def loaded(self) -> list[tuple[str, int, str]]:
        """(name, bytes held in memory, device) of each model that is loaded."""
        return [(name, engine.memory_bytes, str(engine.device)) for name, engine in list(self._engines.items())]
