"""Names become folders through the real clients, against a server on loopback that speaks the stores' protocols."""

import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from paddlemix.auto import AutoConfigMIX, AutoProcessorMIX, AutoTokenizerMIX
from paddlemix.errors import UserError
from paddlemix.models.llava import checkpoint, hub
from paddlemix.models.llava.configuration import LlavaConfig
from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM
from paddlemix.processors.llava import LlavaProcessor
from tests.checkpoints import write_clip, write_hugging_face, write_json, write_original, write_toolkit
from tests.fixtures import tiny_models as tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Store(BaseHTTPRequestHandler):
    """The Hugging Face hub's API (model info, resolve) and PaddleNLP's bucket, over folders of files."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        store = self.server.store
        store.requests.append((self.command, self.path))
        parts = self.path.split("?")[0].strip("/").split("/")
        if store.refuses or (self.command, parts[-1]) in store.fails:
            return self.send(store.refuses or store.fails.pop((self.command, parts[-1])), b"", {}, body)
        if parts[:2] == ["api", "models"] and store.lists:
            name = "/".join(parts[2:4])
            folder = store.hugging_face / name
            if not folder.is_dir():
                return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
            files = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
            info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": files, "tags": [], "private": False}
            return self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)
        if len(parts) > 4 and parts[2] == "resolve":
            path = store.hugging_face.joinpath(*parts[:2], *parts[4:])
        elif parts[:2] == ["models", "community"]:
            path = store.paddle.joinpath(*parts[2:])
        else:
            return self.send(404, b"", {}, body)
        if not path.is_file():
            known = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            return self.send(404, b"", known if store.lists else {}, body)
        data = path.read_bytes()
        etag = hashlib.sha256(data).hexdigest()[:40]
        known = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(data))}
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1]) if self.headers["Range"] else 0
        if start and store.ranges:
            store.resumed.append(path.name)
            return self.send(206 if start < len(data) else 416, data[start:], known, body)
        self.send(200, data, known, body, store.cuts.pop(path.name, None) if body else None)

    def send(self, status, data, headers, body, most=None):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data[:most])
            self.close_connection = most is not None

    def log_message(self, *_):
        pass


class Stores:
    def __init__(self, root: Path, address: str):
        self.hugging_face, self.paddle, self.address = root / "hugging_face", root / "paddle", address
        self.requests = []
        self.lists, self.refuses = True, None
        self.fails = {}  # (method, file) -> status, once
        self.cuts = {}  # file -> bytes after which the connection breaks, once
        self.ranges, self.resumed = True, []

    def downloads(self):
        return [path.rsplit("/", 1)[-1] for method, path in self.requests if method == "GET" and "/api/" not in path]


@pytest.fixture
def stores(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    server.store = Stores(tmp_path / "stores", f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.store.address)
    monkeypatch.setenv("PPNLP_ENDPOINT", server.store.address)
    caches(monkeypatch, tmp_path)
    yield server.store
    server.shutdown()
    server.server_close()


def caches(monkeypatch, tmp_path):
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("PPNLP_HOME", str(tmp_path / "ppnlp"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def unreachable(tmp_path, monkeypatch):
    """No server at all behind either store's address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    server.server_close()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("PPNLP_ENDPOINT", address)
    caches(monkeypatch, tmp_path)


def opens(name):
    """Opens model and processor by name; the weights are the tiny model's."""
    model, processor = LlavaLlamaForCausalLM.from_pretrained(name), LlavaProcessor.from_pretrained(name)
    embeddings = model.llama.embed_tokens.weight.numpy()
    np.testing.assert_array_equal(embeddings, tiny.weights("llava")["language_model.model.embed_tokens.weight"])
    assert processor(text="Hello")["input_ids"].shape[1] > 1
    return model


# ---- the Hugging Face hub ----


def test_hugging_face_names(stores, monkeypatch):
    folder = write_hugging_face(stores.hugging_face / "llava-hf/llava-1.5-7b-hf", shards=2)
    for name in ("README.md", "pytorch_model.bin", "training_args.bin", "onnx_model.onnx"):
        (folder / name).write_bytes(b"x")
    opens("llava-hf/llava-1.5-7b-hf")
    fetched = stores.downloads()
    assert "model-00001-of-00002.safetensors" in fetched and "preprocessor_config.json" in fetched
    assert not {"README.md", "pytorch_model.bin", "training_args.bin", "onnx_model.onnx"} & set(fetched)
    assert len(fetched) == len(set(fetched))  # once only, though config, model and processor were opened
    # from here on without the network
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    stores.requests.clear()
    opens("llava-hf/llava-1.5-7b-hf")
    assert stores.requests == []


def test_a_copy_in_the_cache_opens_when_the_hub_is_down(stores, monkeypatch):
    write_hugging_face(stores.hugging_face / "llava-hf/tiny")
    opens("llava-hf/tiny")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    opens("llava-hf/tiny")


def test_the_original_release_fetches_its_tower_by_name(stores, tmp_path):
    tower = "openai/clip-vit-large-patch14-336"
    write_original(stores.hugging_face / "liuhaotian/llava-v1.5-7b", tower=tmp_path / "clip", mm_vision_tower=tower)
    path = stores.hugging_face / "liuhaotian/llava-v1.5-7b/config.json"
    config = json.loads(path.read_text())
    write_json(path, {**config, "vision_config": tiny.VISION})
    write_clip(stores.hugging_face / tower, tiny.weights("llava"))
    model = opens("liuhaotian/llava-v1.5-7b")
    expected = tiny.weights("llava")["vision_tower.vision_model.embeddings.class_embedding"]
    found = model.llama.vision_tower.vision_tower.vision_model.class_embedding.numpy()
    np.testing.assert_array_equal(found, expected)
    assert "pytorch_model-00001-of-00002.bin" in stores.downloads() and "pytorch_model.bin" in stores.downloads()


def test_an_unknown_name_says_which_files_to_put_where(stores):
    with pytest.raises(UserError) as refusal:
        checkpoint.resolve("llava-hf/no-such-model")
    message = str(refusal.value)
    for part in ("llava-hf/no-such-model", "Hugging Face hub", "config.json", "model.safetensors", "tokenizer", "into"):
        assert part in message
    assert "\n" not in message


def test_a_repository_without_a_config(stores):
    (stores.hugging_face / "llava-hf/empty").mkdir(parents=True)
    (stores.hugging_face / "llava-hf/empty/README.md").write_text("x")
    with pytest.raises(UserError, match="no config.json there"):
        checkpoint.resolve("llava-hf/empty")


@pytest.mark.parametrize("shards", [1, 2])
def test_a_mirror_that_hands_out_files_and_lists_none(stores, shards):
    stores.lists = False
    write_hugging_face(stores.hugging_face / "llava-hf/tiny", shards=shards)
    opens("llava-hf/tiny")
    with pytest.raises(UserError, match="no config.json there"):
        checkpoint.resolve("llava-hf/none")


# ---- PaddleNLP's store ----


@pytest.mark.parametrize("name", ["paddlemix/llava/llava-v1.5-7b", "paddlemix/llava-v1.5-7b"])
def test_paddle_names(stores, name, monkeypatch):
    write_toolkit(stores.paddle / "paddlemix/llava/llava-v1.5-7b")
    opens(name)
    fetched = stores.downloads()
    assert "model_state.pdparams" in fetched and "tokenizer.model" in fetched
    assert len(fetched) == len(set(fetched))
    stores.requests.clear()
    monkeypatch.setenv("PPNLP_ENDPOINT", "http://127.0.0.1:9")
    opens(name)
    assert stores.requests == []


def test_the_older_of_the_two_names_in_the_store(stores):
    write_toolkit(stores.paddle / "paddlemix/llava-v1.6-7b", "llava_next", shards=2)
    folder = checkpoint.resolve("paddlemix/llava/llava-v1.6-7b")
    assert checkpoint.read_config(folder).image_aspect_ratio == "anyres"
    assert len(list(folder.glob("model_state-*-of-00002.pdparams"))) == 2


@pytest.mark.parametrize("name", ["paddlemix/llava/llava-v1.6-7b", "paddlemix/llava-v1.6-7b"])
def test_the_short_name_of_the_model_on_vicuna(stores, name):
    write_toolkit(stores.paddle / "paddlemix/llava/llava-v1.6-vicuna-7b", "llava_next")
    assert checkpoint.read_config(checkpoint.resolve(name)).image_aspect_ratio == "anyres"


def test_the_toolkits_tower_comes_from_the_same_store(stores):
    folder = write_toolkit(stores.paddle / "paddlemix/llava/llava-v1.5-7b", suffix="safetensors")
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    start = "llama.vision_tower.vision_tower."
    (stores.paddle / "openai/clip").mkdir(parents=True)
    tower = {name[len(start) :]: values for name, values in tensors.items() if name.startswith(start)}
    save_file(tower, stores.paddle / "openai/clip/model.safetensors")
    write_json(stores.paddle / "openai/clip/config.json", tiny.VISION)
    save_file(
        {name: v for name, v in tensors.items() if name not in tensors or not name.startswith(start)},
        folder / "model.safetensors",
    )
    config = json.loads((folder / "config.json").read_text())
    del config["vision_config"]
    write_json(folder / "config.json", {**config, "mm_vision_tower": "openai/clip"})
    model = opens("paddlemix/llava/llava-v1.5-7b")
    assert model.config.vision.hidden_size == tiny.VISION["hidden_size"]
    assert not any("/api/models" in path for _, path in stores.requests)


def test_a_store_with_half_a_model(stores):
    folder = write_toolkit(stores.paddle / "paddlemix/llava/llava-v1.5-13b", shards=2)
    (folder / "model_state-00002-of-00002.pdparams").unlink()
    with pytest.raises(UserError, match="without its shards model_state-00002-of-00002.pdparams"):
        checkpoint.resolve("paddlemix/llava/llava-v1.5-13b")


@pytest.mark.parametrize(
    "method, file", [("HEAD", "tokenizer.model"), ("HEAD", "config.json"), ("GET", "model_state.pdparams")]
)
def test_an_error_of_the_store_that_passes(stores, method, file):
    write_toolkit(stores.paddle / "paddlemix/llava/llava-v1.5-7b")
    stores.fails[method, file] = 503
    with pytest.raises(UserError, match="the server answers 503 Service Unavailable"):
        checkpoint.resolve("paddlemix/llava/llava-v1.5-7b")
    opens("paddlemix/llava/llava-v1.5-7b")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_breaks_goes_on_where_it_was(stores, tmp_path, monkeypatch, ranges):
    monkeypatch.setattr("paddlenlp.utils.download.common.DOWNLOAD_CHUNK_SIZE", 1 << 16)  # else all of it is one piece
    folder = write_toolkit(stores.paddle / "paddlemix/llava/llava-v1.5-7b")
    stores.ranges, stores.cuts = ranges, {"model_state.pdparams": (folder / "model_state.pdparams").stat().st_size // 2}
    with pytest.raises(UserError, match="model store .*IncompleteRead"):
        checkpoint.resolve("paddlemix/llava/llava-v1.5-7b")
    opens("paddlemix/llava/llava-v1.5-7b")
    assert stores.resumed == (["model_state.pdparams"] if ranges else [])
    place = tmp_path / "ppnlp/models"
    assert not [path for path in place.rglob("*") if path.name.startswith("tmp") or path.name.endswith(".incomplete")]


def test_all_of_a_file_was_there_already(stores, tmp_path):
    """A start that was killed between the last byte and the file's own name."""
    folder = write_toolkit(stores.paddle / "paddlemix/llava/llava-v1.5-7b")
    begun = tmp_path / "ppnlp/models/paddlemix/llava/llava-v1.5-7b/model_state.pdparams.incomplete"
    begun.parent.mkdir(parents=True)
    begun.write_bytes((folder / "model_state.pdparams").read_bytes())
    opens("paddlemix/llava/llava-v1.5-7b")


@pytest.mark.parametrize(
    "name, variable", [("paddlemix/llava/llava-v1.5-7b", "PPNLP_HOME"), ("llava-hf/tiny", "HF_HOME")]
)
def test_a_place_that_cannot_be_written_is_named(stores, tmp_path, monkeypatch, name, variable):
    write_toolkit(stores.paddle / "paddlemix/llava/llava-v1.5-7b")
    write_hugging_face(stores.hugging_face / "llava-hf/tiny")
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv(variable, str(tmp_path / "file"))
    with pytest.raises(UserError, match=f"look at the room and the rights of {tmp_path}/file/.*{variable}"):
        checkpoint.resolve(name)


def test_small_files_alone(stores):
    write_toolkit(stores.paddle / "paddlemix/llava/llava-v1.5-7b")
    write_hugging_face(stores.hugging_face / "llava-hf/tiny")
    for lists in (True, False):
        stores.lists = lists
        for name in ("paddlemix/llava/llava-v1.5-7b", "llava-hf/tiny"):
            assert (hub.resolve(name, weights=False) / "config.json").is_file()
    assert not [file for file in stores.downloads() if file.startswith("model")]
    asked = len(stores.requests)
    assert LlavaConfig.from_pretrained("paddlemix/llava/llava-v1.5-7b") is not None
    assert len(stores.requests) == asked, "what is known to be all must not be asked for again"
    for name in ("paddlemix/llava/llava-v1.5-7b", "llava-hf/tiny"):
        opens(name)


@pytest.mark.parametrize(
    "opened",
    [
        *(AutoConfigMIX, AutoTokenizerMIX, AutoProcessorMIX),
        *(LlavaConfig, LlavaProcessor),
    ],
)
def test_config_tokenizer_and_processor_need_no_weights(stores, opened):
    write_toolkit(stores.paddle / "paddlemix/llava/llava-v1.5-7b")
    write_hugging_face(stores.hugging_face / "llava-hf/tiny")
    for name in ("paddlemix/llava/llava-v1.5-7b", "llava-hf/tiny"):
        assert opened.from_pretrained(name) is not None
    assert not [file for file in stores.downloads() if file.startswith("model")]
    for name in ("paddlemix/llava/llava-v1.5-7b", "llava-hf/tiny"):
        opens(name)


def test_weights_that_alone_tell_the_config_are_fetched_for_it(stores):
    tied = write_hugging_face(stores.hugging_face / "llava-hf/tied")
    config = json.loads((tied / "config.json").read_text())
    write_json(tied / "config.json", {**config, "tie_word_embeddings": True})  # but there is a head
    assert AutoConfigMIX.from_pretrained("llava-hf/tied").tie_word_embeddings is False
    larger = write_toolkit(
        stores.paddle / "paddlemix/llava/larger", mm_vision_tower="openai/clip-vit-large-patch14-336"
    )
    config = json.loads((larger / "config.json").read_text())
    config.pop("vision_config", None)
    write_json(larger / "config.json", config)
    with pytest.raises(UserError, match="how many heads its vision tower"):  # it is not the tower of that name
        AutoConfigMIX.from_pretrained("paddlemix/llava/larger")
    named = write_original(stores.hugging_face / "org/named", mm_vision_tower="org/tower-nobody-knows")
    config = json.loads((named / "config.json").read_text())
    vision = config.pop("vision_config")
    write_json(named / "config.json", config)
    with pytest.raises(UserError, match=f"how many heads its vision tower of width {vision['hidden_size']} has"):
        AutoConfigMIX.from_pretrained("org/named")


def test_an_index_that_was_left_beside_whole_weights(stores):
    folder = write_hugging_face(stores.hugging_face / "llava-hf/tiny")
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    opens("llava-hf/tiny")


def test_an_endpoint_may_end_with_a_slash(stores, monkeypatch):
    write_toolkit(stores.paddle / "paddlemix/llava/llava-v1.5-7b")
    write_hugging_face(stores.hugging_face / "llava-hf/tiny")
    for variable in ("HF_ENDPOINT", "PPNLP_ENDPOINT"):
        monkeypatch.setenv(variable, stores.address + "/")
    opens("paddlemix/llava/llava-v1.5-7b")
    opens("llava-hf/tiny")
    assert not [path for _, path in stores.requests if "//" in path]


def test_an_index_that_names_no_shards(stores):
    folder = write_toolkit(stores.paddle / "paddlemix/llava/llava-v1.5-13b", shards=2)
    write_json(folder / "model_state.pdparams.index.json", {"weight_map": []})
    with pytest.raises(UserError, match="has no weight_map"):
        checkpoint.resolve("paddlemix/llava/llava-v1.5-13b")


def test_a_paddle_name_that_is_not_there(stores, tmp_path):
    with pytest.raises(UserError) as refusal:
        checkpoint.resolve("paddlemix/llava-v9-7b")
    message = str(refusal.value)
    place = tmp_path / "ppnlp/models/paddlemix/llava/llava-v9-7b"
    assert "PaddleNLP's model store" in message and str(place) in message and "\n" not in message
    # and what it says to do works
    write_toolkit(place)
    opens("paddlemix/llava-v9-7b")


# ---- offline ----


@pytest.mark.parametrize("name", ["llava-hf/llava-1.5-7b-hf", "liuhaotian/llava-v1.5-7b"])
def test_without_a_network_the_error_says_what_to_do(unreachable, tmp_path, name):
    with pytest.raises(UserError) as refusal:
        checkpoint.resolve(name)
    message = str(refusal.value)
    assert name in message and "check the name and the network" in message and "config.json" in message
    assert str(tmp_path / name) in message and "\n" not in message
    write_hugging_face(tmp_path / name)  # what the error says
    assert checkpoint.resolve(name) == Path(name)


def test_paddles_store_without_a_network(unreachable):
    with pytest.raises(UserError, match="PaddleNLP's model store .*check the name and the network"):
        checkpoint.resolve("paddlemix/llava/llava-v1.5-7b")


def test_what_the_server_answers_is_said(stores):
    for status, said in (
        (403, "403 Forbidden.*HF_TOKEN"),
        (401, "401 Unauthorized.*HF_TOKEN"),
    ):
        stores.refuses = status
        with pytest.raises(UserError, match=f"the server answers {said}"):
            checkpoint.resolve("llava-hf/tiny")
    for status in (401, 403, 503):
        stores.refuses = status
        with pytest.raises(UserError, match=f"model store .the server answers {status}"):
            checkpoint.resolve("paddlemix/llava/llava-v1.5-7b")


def test_offline_mode_asks_nobody(stores, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        checkpoint.resolve("llava-hf/tiny")
    assert stores.requests == []


# ---- what is no name ----


@pytest.mark.parametrize(
    "text", ["", " ", None, "./missing", "/no/such/folder", "~/none", "word", "a b/c", "a/b/c/d", "../x/y", "x" * 300]
)
def test_paths_that_are_not_there(text, monkeypatch):
    monkeypatch.setattr(hub, "_from_hugging_face", lambda name: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="There is no folder|is empty|is None|is neither a folder nor a name"):
        checkpoint.resolve(text)


def test_a_folder_goes_before_a_name(stores, tmp_path):
    write_hugging_face(tmp_path / "llava-hf/tiny")
    assert checkpoint.resolve("llava-hf/tiny") == Path("llava-hf/tiny")
    shutil.rmtree(tmp_path / "llava-hf")
    assert stores.requests == []
