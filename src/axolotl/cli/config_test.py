from __future__ import annotations

import contextlib
import http.server
import importlib
import io
import os
import ssl
import stat
import sys
import threading
import urllib.request
from pathlib import Path

import pytest

from axolotl.cli import config as config_module
from axolotl.cli.config import check_remote_config, choose_config, find_config, inspect_cfg, load_cfg, read_config
from axolotl.exceptions import ConfigError, OutputError
from axolotl.logging_config import configure_logging
from axolotl.utils.dict import DictDefault
from axolotl.utils.tee import close_debug_log

MODEL_CONFIG = """{"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}"""


@pytest.fixture
def written(tmp_path):
    """A config file that loads, its folder being `tmp_path`."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(MODEL_CONFIG)
    path = tmp_path / "c.yml"
    path.write_text(
        f"base_model: {model}\ndatasets:\n  - path: rows.jsonl\n    type: alpaca\nmicro_batch_size: 1\n"
        f"gradient_accumulation_steps: 2\nlearning_rate: 1e-4\noutput_dir: {tmp_path / 'out'}\n"
    )
    yield path
    close_debug_log()


def test_load_cfg_reads_overrides_checks_and_resolves(written):
    cfg = load_cfg(written, micro_batch_size="4", seed=7, num_epochs=None)
    assert isinstance(cfg, DictDefault)
    assert (cfg.micro_batch_size, cfg.seed, cfg.batch_size) == (4, 7, 8)
    assert cfg.learning_rate == 1e-4
    assert cfg.axolotl_config_path == str(written)
    assert cfg.never_heard_of_it is None


def test_load_cfg_takes_a_config_already_read(written):
    assert load_cfg(DictDefault(read_config(written)), seed="3").seed == 3


def test_modules_of_the_working_directory_can_be_named(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    (tmp_path / "module_beside_the_config.py").write_text("FOUND = True\n")
    inspect_cfg(written)
    assert importlib.import_module("module_beside_the_config").FOUND


def test_all_problems_at_once(written):
    with pytest.raises(ConfigError) as error:
        load_cfg(written, micro_batch_size="many", learning_rte="1")
    assert len(error.value.problems) == 2
    assert "micro_batch_size" in str(error.value)
    assert "learning_rte" in str(error.value)


def test_the_log_goes_to_the_output_folder_without_secrets(written, tmp_path):
    configure_logging()
    body = written.read_text() + "wandb_name: hello\nhub_revision: https://me:s3cret@host/x\n"
    written.write_text(body)
    load_cfg(written)
    print("a later line")
    text = (tmp_path / "out/debug.log").read_text()
    assert "wandb_name: hello" in text
    assert "a later line" in text
    assert "s3cret" not in text


def test_looking_leaves_no_trace(written, tmp_path):
    before = dict(os.environ)
    cfg = inspect_cfg(written, wandb_name="hello")
    assert cfg.batch_size == 2
    assert not (tmp_path / "out").exists()
    assert os.environ == before


def test_an_output_folder_that_cannot_be_written(written, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="output_dir"):
        load_cfg(written, output_dir=str(tmp_path / "file/below"))


def test_missing_config_names_the_nearest(tmp_path):
    (tmp_path / "lora.yml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"Did you mean `.*lora\.yml`"):
        find_config(tmp_path / "lorra.yml")
    with pytest.raises(ConfigError, match=r"folder .* does not exist"):
        find_config(tmp_path / "none/lora.yml")
    with pytest.raises(ConfigError, match="axolotl fetch examples"):
        find_config("examples/none-such/lora.yml")


@pytest.mark.parametrize("argument", ["", " "])
def test_an_empty_argument_is_not_this_folder(written, monkeypatch, argument):
    monkeypatch.chdir(written.parent)
    with pytest.raises(ConfigError, match="CONFIG argument is empty"):
        find_config(argument)


def test_config_dir_variable(tmp_path, monkeypatch):
    (tmp_path / "lora.yml").write_text("a: 1")
    monkeypatch.setenv("AXOLOTL_CONFIG_DIR", str(tmp_path))
    assert find_config("lora.yml") == tmp_path / "lora.yml"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permission_denied(tmp_path):
    path = tmp_path / "c.yml"
    path.write_text("a: 1")
    path.chmod(stat.S_IWUSR)
    with pytest.raises(ConfigError, match="Permission denied"):
        read_config(path)


def test_folder_with_one_config(tmp_path):
    (tmp_path / "only.yaml").write_text("a: 1")
    (tmp_path / "notes.txt").write_text("")
    assert choose_config(tmp_path) == str(tmp_path / "only.yaml")
    assert find_config(tmp_path) == tmp_path / "only.yaml"


def test_folder_without_config(tmp_path):
    with pytest.raises(ValueError, match="No config found"):
        choose_config(tmp_path)


def test_folder_with_several_configs(tmp_path, monkeypatch):
    for name in ("b.yml", "a.yml"):
        (tmp_path / name).write_text("a: 1")
    monkeypatch.setattr(sys, "stdin", io.StringIO("2\n"))
    with pytest.raises(ConfigError, match=r"(?s)several configs.*1\. a\.yml\n.*2\. b\.yml"):
        choose_config(tmp_path)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("7\nx\n2\n"))
    assert choose_config(tmp_path) == str(tmp_path / "b.yml")


def test_standard_input(monkeypatch):
    text = b'{"input": {"args": {"base_model": "a/b"}, "credentials": {"hf_token": "s3cret"}}}'
    monkeypatch.setenv("HF_TOKEN", "mine")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    path = find_config("-")
    assert read_config(path) == {"base_model": "a/b"}
    assert "s3cret" not in path.read_text()


def test_http_is_refused_and_paths_pass():
    with pytest.raises(ValueError, match="http://"):
        check_remote_config("http://example.com/c.yml")
    assert check_remote_config("some/c.yml") == "some/c.yml"
    assert check_remote_config(Path("some/c.yml")) == Path("some/c.yml")


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves the pages of its server."""

    def do_GET(self):
        status, body = self.server.pages.get(self.path, (404, b""))
        self.send_response(status)
        if status == 302:
            self.send_header("Location", body.decode())
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def https_server(tmp_path, monkeypatch):
    """A real https server on this machine; its certificate is trusted for the test."""
    import subprocess

    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    made = subprocess.run([*command.split(), "-keyout", key, "-out", cert], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("openssl cannot make a certificate here")
    server = http.server.ThreadingHTTPServer(("localhost", 0), _Handler)
    server.pages = {}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    trusting = urllib.request.build_opener(
        urllib.request.ProxyHandler({}),
        urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=str(cert))),
    )
    monkeypatch.setattr(urllib.request, "urlopen", trusting.open)
    yield server
    server.shutdown()
    server.server_close()


def test_https_configs(https_server):
    base = f"https://localhost:{https_server.server_port}"
    https_server.pages = {
        "/c.yml": (200, b"base_model: a/b\n"),
        "/c.json": (200, b'{"base_model": "a/b"}'),
        "/list": (200, b"- a\n"),
        "/huge": (200, b"a: " + b"x" * (config_module.MAX_REMOTE_BYTES + 10)),
        "/page": (200, b"<!DOCTYPE html><html><a href='x'>: {</a></html>"),
        "/down": (302, f"http://localhost:{https_server.server_port}/c.yml".encode()),
    }
    for page in ("/c.yml", "/c.json"):
        assert read_config(check_remote_config(base + page)) == {"base_model": "a/b"}
        assert read_config(find_config(Path(base + page))) == {"base_model": "a/b"}
    for page, message in {
        "/none": "404",
        "/list": "holds a list",
        "/huge": "longer than 1 MiB",
        "/page": "valid YAML|holds text",
    }.items():
        with pytest.raises(ConfigError, match=message):
            check_remote_config(base + page)
    with pytest.raises(ConfigError):
        check_remote_config(base + "/down")
    with pytest.raises(ConfigError, match="cannot be fetched"):
        check_remote_config("https://localhost:1/c.yml")
