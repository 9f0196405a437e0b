"""From names to engines: all that can be wrong with a name, a folder or a download, and the released format loaded.

The hub is a small local server that speaks the hub's protocol, so huggingface_hub itself runs unchanged.
Run: pytest tests/model/test_loading.py
"""

import errno
import hashlib
import http.server
import importlib.util
import json
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from model import loading
from model.engine import choose_threads
from model.errors import UserError
from model.instrument import ATTENTION
from model.loading import Zoo, choose_attention, choose_device, choose_dtype, find, hub_sentence, load
from model.plan import Plan
from model.types import Sampling
from tests import tiny


def refusal(name, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(str(name), **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, message
    return message


@pytest.fixture
def qwen(tmp_path) -> Path:
    """A copy of the tiny released-format folder, to be damaged."""
    return Path(shutil.copytree(tiny.folder("qwen"), tmp_path / "qwen"))


@pytest.fixture
def hires(tmp_path) -> Path:
    return Path(shutil.copytree(tiny.folder("hires"), tmp_path / "hires"))


# ---- folders


def test_a_released_format_folder_loads_without_torchvision_and_answers(qwen):
    assert importlib.util.find_spec("torchvision") is None, "this test is to show that images work without torchvision"
    assert len(list(qwen.glob("model-*-of-*.safetensors"))) > 1, "the folder is to be sharded"
    engine = load(str(qwen))
    assert engine.family == "qwen3_vl" and engine.name == str(qwen)
    assert str(engine.layout.default) == "base@0,0@1,1@2,2@3"
    prompt = engine.prompt(tiny.ask(tiny.image(size=(64, 32)), "What is this?"))
    answer = engine.answer(prompt, engine.layout.default, Sampling(max_new_tokens=4))
    assert len(answer.tokens) > 0 and answer.visual_tokens == 8


@pytest.mark.parametrize(
    "kind, family", [("hires", "deepstack_llava"), ("concat", "deepstack_llava"), ("qwen", "qwen3_vl")]
)
def test_the_config_decides_the_family_and_weights_are_those_of_the_folder(kind, family):
    engine, other = load(str(tiny.folder(kind))), tiny.engine(kind)
    assert engine.family == family
    for (name, ours), theirs in zip(engine.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_progress_tells_what_is_being_done():
    said = []
    load(str(tiny.folder("hires")), progress=lambda fraction, text: said.append((fraction, text)))
    assert [fraction for fraction, _ in said] == [0.9, 1.0] and "ready" in said[-1][1]


def test_folders_that_are_not_models(tmp_path, qwen):
    assert "no folder" in refusal(tmp_path / "nowhere")
    assert "no folder" in refusal("./nowhere/at/all")
    assert "is a file" in refusal(qwen / "config.json")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no config.json" in refusal(empty)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": 3, "torch_dtype": {}}', "\xff"])
def test_a_damaged_config_is_one_sentence(qwen, text):
    (qwen / "config.json").write_text(text, encoding="latin-1")
    refusal(qwen)


def test_a_config_whose_numbers_do_not_fit_the_weights_is_one_sentence(qwen):
    config = json.loads((qwen / "config.json").read_text())
    config["text_config"]["hidden_size"] = 128
    (qwen / "config.json").write_text(json.dumps(config))
    assert "cannot be loaded" in refusal(qwen)


@pytest.mark.parametrize(
    "model_type, words",
    [
        ("gpt2", "type “gpt2” are not supported"),
        ("not_a_type_at_all", "not supported"),
    ],
)
def test_other_model_types_are_refused_with_the_list_of_supported_ones(qwen, model_type, words):
    config = json.loads((qwen / "config.json").read_text())
    (qwen / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    message = refusal(qwen)
    assert words in message and "Supported are Qwen3-VL, " in message and " DeepStack-L, " in message


def test_pickles_are_never_opened(hires):
    weights = load_file(hires / "model.safetensors")
    (hires / "model.safetensors").unlink()
    torch.save(weights, hires / "pytorch_model.bin")
    message = refusal(hires)
    assert "pytorch_model.bin is a pickle" in message and "safetensors" in message
    (hires / "pytorch_model.bin").unlink()
    assert "no model.safetensors" in refusal(hires)


@pytest.mark.parametrize("keep", [0, 5, 100, -50])
def test_truncated_weights_are_named(hires, keep):
    data = (hires / "model.safetensors").read_bytes()
    (hires / "model.safetensors").write_bytes(data[:keep])
    assert "model.safetensors" in refusal(hires) and "damaged" in refusal(hires)


def test_a_git_lfs_pointer_is_not_weights(hires):
    (hires / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n")
    assert "download it again" in refusal(hires)


def test_a_missing_shard_and_a_damaged_index_are_named(qwen):
    shard = sorted(qwen.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(qwen)
    (qwen / "model.safetensors.index.json").write_text("{}")
    assert "index" in refusal(qwen)


def test_weights_that_lack_a_tensor_are_refused_not_filled_with_noise(hires):
    weights = load_file(hires / "model.safetensors")
    name = next(name for name in weights if "multi_modal_projector.linear_2.weight" in name)
    count = weights.pop(name).numel()
    save_file(weights, hires / "model.safetensors", metadata={"format": "pt"})
    assert f"lacks {count:,} of" in refusal(hires)


@pytest.mark.parametrize("file", ["tokenizer.json", "preprocessor_config.json"])
def test_a_folder_that_lacks_a_small_file_is_one_sentence(qwen, file):
    (qwen / file).unlink()
    assert file in refusal(qwen)


# ---- names


def test_names_that_mean_no_model():
    for name in (
        "",
        "  ",
        "embedded/nothing",
        "what is this",
        "a/b?c",
        "https://huggingface.co/Qwen/Qwen3-VL-2B-Instruct",
    ):
        refusal(name)
    assert "embedded/nothing" in refusal("embedded/nothing")


def test_embedded_means_its_default(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "CHECKPOINTS", tmp_path)
    for name in ("taps", "hires", "a"):
        shutil.copytree(tiny.folder("hires"), tmp_path / name)
    (tmp_path / "unfinished").mkdir()
    assert loading.embedded_names() == ["embedded/hires", "embedded/a", "embedded/taps"]
    assert find("embedded") == find("embedded/hires") == tmp_path / "hires"
    assert load("embedded").name == "embedded/hires"


# ---- device and number format


def test_the_device_comes_with_its_reason():
    device, why = choose_device()
    assert (device.type, "found" in why) == ("cuda" if torch.cuda.is_available() else "cpu", True)
    assert choose_device("cpu") == (torch.device("cpu"), "cpu: asked for")


@pytest.mark.parametrize(
    "wanted", ["gpu", "cuda:99", "cpu:x", "mps" if not torch.backends.mps.is_available() else "xpu", "meta?"]
)
def test_a_device_that_is_not_there_is_refused_with_those_that_are(wanted):
    with pytest.raises(UserError, match="cpu"):
        choose_device(wanted)


def test_the_number_format_comes_with_its_reason():
    cpu = torch.device("cpu")
    assert choose_dtype(None, cpu, 10**10)[0] is torch.float32
    assert choose_dtype("bf16", cpu, 1) == (torch.bfloat16, "bfloat16: asked for")
    assert choose_dtype(None, torch.device("cuda"), 10**6) == (torch.float32, "float32: the model is small")
    with pytest.raises(UserError, match="float32, bfloat16, float16"):
        choose_dtype("int4", cpu, 1)


def test_attention_comes_with_its_reason(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_attention(None, cpu, torch.float32) == ("sdpa", "sdpa attention: PyTorch's own")
    assert "flash kernels of its own" in choose_attention("auto", cuda, torch.bfloat16)[1]
    assert choose_attention("eager", cpu, torch.float32)[0] == "eager"
    with pytest.raises(UserError, match="“fast” is not known; use one of auto, sdpa, flash, eager"):
        choose_attention("fast", cpu, torch.float32)
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package flash-attn, which is not installed"):
        choose_attention("flash", cuda, torch.bfloat16)
    monkeypatch.setattr(loading, "find_spec", lambda name: name)
    assert choose_attention("flash", cuda, torch.bfloat16)[0] == "flash"
    for device, dtype in ((cpu, torch.bfloat16), (cuda, torch.float32)):
        with pytest.raises(UserError, match="runs on a CUDA GPU in bfloat16 or float16, not on c"):
            choose_attention("flash", device, dtype)


def test_how_a_model_runs_is_said_and_a_wish_that_cannot_be_is_one_sentence():
    engine = load(str(tiny.folder("hires")), device="cpu", attention="eager", decode="plain")
    assert engine.reasons[3:] == ("eager attention: asked for; slow, all scores at once", "plain decoding: asked for")
    assert engine.adapter.decoder.config._attn_implementation == ATTENTION["eager"] and engine.compiled is None
    for how in ({"attention": "fast"}, {"decode": "fast"}):
        with pytest.raises(UserError, match="“fast” is not known"):
            load(str(tiny.folder("hires")), device="cpu", **how)


def test_split_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # where there is a GPU, too
    with pytest.raises(UserError, match="split spreads a model over the GPUs, and none was found"):
        load(str(tiny.folder("hires")), device="split")


@pytest.mark.parametrize("wanted", ["int8", "nf4"])
def test_quantised_weights_need_their_package_and_a_gpu(wanted):
    with pytest.raises(UserError, match="needs the package bitsandbytes|runs on a CUDA GPU, not on cpu"):
        load(str(tiny.folder("hires")), device="cpu", dtype=wanted)


def test_engines_say_why_and_what_they_hold():
    engine = load(str(tiny.folder("hires")), device="cpu", dtype="bfloat16")
    assert engine.dtype is torch.bfloat16 and engine.device.type == "cpu"
    assert engine.reasons[:2] == ("cpu: asked for", "bfloat16: asked for")
    assert engine.reasons[2].startswith("one compute thread") and engine.threads == 1
    parameters = sum(p.numel() for p in engine.model.parameters())
    assert parameters * 2 <= engine.memory_bytes < parameters * 2.1


def test_a_model_that_does_not_fit_into_memory_is_refused_before_it_is_read():
    with pytest.raises(UserError, match="x needs 1100000.0 GB of memory on cpu"):
        loading.check_memory(10**15, torch.device("cpu"), "x")


def test_small_models_compute_with_one_thread_and_leave_the_callers_number_alone():
    engine = load(str(tiny.folder("hires")), device="cpu")
    used = []
    prompt = engine.prompt(tiny.ask(tiny.image(1), "What?"))

    def ask():
        torch.set_num_threads(2)
        handle = engine.adapter.lm_head.register_forward_hook(lambda *_: used.append(torch.get_num_threads()))
        engine.answer(prompt, Plan(), Sampling(max_new_tokens=2))
        handle.remove()
        return torch.get_num_threads()

    before = torch.get_num_threads()
    with ThreadPoolExecutor(1) as pool:
        assert (ask(), pool.submit(ask).result()) == (2, 2)
    torch.set_num_threads(before)
    assert set(used) == {1}
    assert choose_threads(torch.device("cpu"), 10**9)[0] == before
    assert choose_threads(torch.device("cuda"), 10) == (0, "")


# ---- the zoo


def test_the_zoo_loads_each_model_once_however_many_ask():
    name = str(tiny.folder("hires"))
    zoo = Zoo([name, str(tiny.folder("qwen")), name], device="cpu", attention="eager", decode="plain")
    assert zoo.offered == (name, str(tiny.folder("qwen"))) and zoo.default == name and zoo.loaded() == []
    with ThreadPoolExecutor(8) as pool:
        engines = list(pool.map(lambda _: zoo.get(name), range(8)))
    assert len({id(engine) for engine in engines}) == 1
    assert engines[0].reasons[-2:] == (
        "eager attention: asked for; slow, all scores at once",
        "plain decoding: asked for",
    )
    [(loaded, held, device)] = zoo.loaded()
    assert (loaded, device) == (name, "cpu") and held == engines[0].memory_bytes


def test_only_what_is_offered_can_be_had():
    zoo = Zoo([str(tiny.folder("hires"))])
    for name in (str(tiny.folder("qwen")), "Qwen/Qwen3-VL-2B-Instruct", "", "/etc"):
        with pytest.raises(UserError, match="not offered"):
            zoo.get(name)
    assert zoo.loaded() == []


def test_a_failed_load_can_be_tried_again(hires):
    data = (hires / "model.safetensors").read_bytes()
    (hires / "model.safetensors").write_bytes(data[:100])
    zoo = Zoo([str(hires)])
    with pytest.raises(UserError, match="damaged"):
        zoo.get(str(hires))
    (hires / "model.safetensors").write_bytes(data)
    assert zoo.get(str(hires)).layout.default == Plan.parse("base@0,0@1,1@2,2@3,3@4")


# ---- the hub


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download needs. `models`: id -> folder, or an error (status, code)."""

    protocol_version = "HTTP/1.1"
    models: dict = {}
    claimed_bytes: dict[str, int] = {}  # file name -> the size that the listing tells
    asked: list[str] = []
    commit = "0123456789abcdef0123456789abcdef01234567"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0].strip("/")
        Hub.asked.append(path)
        model = next((name for name in self.models if path.removeprefix("api/models/").startswith(name)), None)
        found = self.models.get(model, (404, "RepoNotFound"))
        if isinstance(found, tuple):
            return self.reply(b"{}", found[0], {"X-Error-Code": found[1]})
        rest = path.removeprefix("api/models/").removeprefix(model).strip("/").split("/")
        if path.startswith("api/") and rest[0] == "tree":
            entries = [
                {
                    "type": "file",
                    "path": f.name,
                    "size": self.claimed_bytes.get(f.name, f.stat().st_size),
                    "oid": etag(f),
                }
                for f in sorted(found.iterdir())
            ]
            return self.reply(json.dumps(entries).encode())
        if path.startswith("api/"):
            return self.reply(json.dumps({"id": model, "sha": self.commit, "siblings": []}).encode())
        file = found / rest[-1]
        if not file.exists():
            return self.reply(b"", 404, {"X-Error-Code": "EntryNotFound"})
        self.reply(file.read_bytes(), 200, {"ETag": f'"{etag(file)}"'}, self.claimed_bytes.get(file.name))

    def reply(self, body: bytes, status: int = 200, headers: dict | None = None, length: int | None = None):
        self.send_response(status)
        headers = {"X-Repo-Commit": self.commit, "Content-Length": length or len(body), **(headers or {})}
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local hub and an empty cache; returns the handler class, whose `models` a test fills."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    Hub.models, Hub.claimed_bytes, Hub.asked = {}, {}, []
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_hub_model_is_downloaded_with_progress_loaded_and_then_had_without_the_hub(hub, monkeypatch):
    hub.models["owner/tiny"] = tiny.folder("qwen")
    said = []
    engine = load("owner/tiny", progress=lambda fraction, text: said.append((fraction, text)))
    assert engine.family == "qwen3_vl" and engine.name == "owner/tiny"
    assert any("downloading owner/tiny" in text for _, text in said) and said[-1][0] == 1.0
    assert [fraction for fraction, _ in said] == sorted(fraction for fraction, _ in said)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert load("owner/tiny").layout == engine.layout and len(hub.asked) == asked


def test_a_hub_id_that_does_not_exist(hub):
    assert "There is no model nobody/nothing on the hub" in refusal("nobody/nothing")


def test_a_gated_model_says_what_to_do(hub):
    hub.models["owner/gated"] = (403, "GatedRepo")
    assert "gated" in refusal("owner/gated") and "HF_TOKEN" in refusal("owner/gated")


def test_a_hub_in_trouble_is_one_sentence(hub):
    hub.models["owner/broken"] = (400, "Oops")
    assert "trouble with owner/broken (it answered 400)" in refusal("owner/broken")


def test_no_network(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "cannot be reached" in refusal("owner/tiny")


def test_a_hub_out_of_reach_is_tried_once(hub, monkeypatch, caplog):
    """Its library would try six times, 25 seconds, and tell of each."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: refused
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        assert "cannot be reached" in refusal("owner/tiny")
    assert "Retrying" not in caplog.text


def test_a_repository_that_is_not_a_model(hub, tmp_path):
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "README.md").write_text("hello")
    hub.models["owner/readme"] = tmp_path / "repo"
    assert "no config.json" in refusal("owner/readme")


def test_the_type_is_looked_at_before_gigabytes_are_downloaded(hub, qwen):
    config = json.loads((qwen / "config.json").read_text())
    (qwen / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    hub.models["owner/new"] = qwen
    assert "type “gpt2” are not supported" in refusal("owner/new")
    assert not [path for path in hub.asked if "safetensors" in path]


def test_a_hub_model_of_pickles_only_is_not_downloaded(hub, hires):
    (hires / "model.safetensors").rename(hires / "pytorch_model.bin")
    hub.models["owner/pickle"] = hires
    assert "no safetensors" in refusal("owner/pickle")
    assert not [path for path in hub.asked if path.endswith(".bin")]


def test_a_model_larger_than_the_free_disk_space_is_not_downloaded(hub, hires):
    hub.models["owner/huge"] = hires
    hub.claimed_bytes["model.safetensors"] = 10**16
    message = refusal("owner/huge")
    assert "10000000.0 GB" in message and "HF_HOME" in message


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_while_downloading_is_said(number):
    assert "No disk space left" in hub_sentence("a/b", OSError(number, "full"))


def test_a_cache_that_cannot_be_written_is_said():
    assert "cannot be written" in hub_sentence("a/b", PermissionError(errno.EACCES, "no"))
