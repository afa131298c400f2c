"""The real coglet server, run on a copy of predict.py in a temporary folder.

``cog build`` writes an OpenAPI document that it reads from the text of predict.py; coglet validates with it.
``openapi_document`` writes the same one, in the same way: from the syntax tree, literals only.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import tokenize
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
QUICK_INPUTS: dict[str, Any] = {
    "pipeline_type": "512",
    "sparse_structure_steps": 1,
    "shape_slat_steps": 1,
    "tex_slat_steps": 1,
    "decimation_target": 100000,
    "texture_size": 1024,
    "generate_video": False,
    "generate_model": False,
}
JSON_TYPES: dict[str, dict[str, str]] = {
    "Path": {"type": "string", "format": "uri"},
    "bool": {"type": "boolean"},
    "float": {"type": "number"},
    "int": {"type": "integer"},
    "str": {"type": "string"},
}


def declared_inputs(source: str) -> dict[str, dict[str, Any]]:
    """Name -> {"type": ..., every keyword of its Input()}, in the order of ``predict``'s parameters.

    Raises ValueError where a value is not one plain literal: Cog would drop it without a word.
    """
    predict = next(
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and node.name == "predict"
    )
    parameters = predict.args.args[1:]
    assert len(parameters) == len(predict.args.defaults)
    inputs = {}
    for parameter, call in zip(parameters, predict.args.defaults, strict=True):
        assert isinstance(call, ast.Call)
        assert isinstance(call.func, ast.Name)
        assert isinstance(parameter.annotation, ast.Name)
        assert call.func.id == "Input"
        assert not call.args
        inputs[parameter.arg] = {"type": parameter.annotation.id} | {
            str(keyword.arg): _literal(keyword.value, source) for keyword in call.keywords
        }
    return inputs


def _literal(node: ast.expr, source: str) -> Any:
    if isinstance(node, ast.List):
        return [_literal(item, source) for item in node.elts]
    text = ast.get_source_segment(source, node) or ""
    kinds = {tokenize.STRING, tokenize.NUMBER, tokenize.NAME, tokenize.OP}
    tokens = [token for token in tokenize.generate_tokens(StringIO(text).readline) if token.type in kinds]
    if not isinstance(node, ast.Constant) or len(tokens) != 1:
        raise ValueError(f"{text} is not one plain literal.")
    return node.value


def openapi_document(source: str) -> dict[str, Any]:
    """What ``cog build`` would write to .cog/openapi_schema.json, as far as coglet reads it."""
    properties: dict[str, Any] = {}
    schemas: dict[str, Any] = {}
    for order, (name, spec) in enumerate(declared_inputs(source).items()):
        schema: dict[str, Any] = {"x-order": order, "description": spec["description"]}
        if "choices" in spec:
            schemas[name] = {
                "title": name,
                "description": "An enumeration.",
                "enum": spec["choices"],
                **JSON_TYPES[spec["type"]],
            }
            schema["allOf"] = [{"$ref": f"#/components/schemas/{name}"}]
        else:
            schema |= {"title": name.replace("_", " ").title(), **JSON_TYPES[spec["type"]]}
        for keyword, field in (
            ("default", "default"),
            ("ge", "minimum"),
            ("le", "maximum"),
            ("accept", "x-cog-accept"),
        ):
            if keyword in spec:
                schema[field] = spec[keyword]
        properties[name] = schema
    required = [name for name, schema in properties.items() if "default" not in schema]
    schemas["Input"] = {"title": "Input", "type": "object", "properties": properties, "required": required}
    schemas["Output"] = {
        "title": "Output",
        "type": "object",
        "properties": {
            name: {"title": name, "type": "string", "format": "uri", "nullable": True}
            for name in declared_outputs(source)
        },
    }
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.23.1"},
        "paths": {},
        "components": {"schemas": schemas},
    }


def declared_outputs(source: str) -> list[str]:
    """Fields of ``class Output``.  Raises ValueError where one is not ``Optional[Path] = None``."""
    output = next(
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef) and node.name == "Output"
    )
    names = []
    for field in output.body:
        if isinstance(field, ast.AnnAssign):
            text = ast.unparse(field)
            name = ast.unparse(field.target)
            if text != f"{name}: Optional[Path] = None":
                raise ValueError(f"{text} is not an Optional[Path] with the default None.")
            names.append(name)
    return names


@dataclass(frozen=True)
class CogServer:
    """A running server: its address, its folder, and the file with all that it printed."""

    url: str
    folder: Path
    process: subprocess.Popen[bytes]
    log: Path

    def request(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and decoded JSON of one HTTP request."""
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json", **(headers or {})},
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        return status, json.loads(text or b"null")

    def predict(self, prediction_id: str | None = None, **inputs: Any) -> tuple[int, Any]:
        """One synchronous prediction; afterwards the server is ready for the next."""
        body: dict[str, Any] = {"input": inputs}
        if prediction_id is not None:
            body["id"] = prediction_id
        answer = self.request("POST", "/predictions", body)
        if answer[0] == 200:  # it answers a moment before it is free again
            self.wait_while("BUSY")
        return answer

    def health(self) -> Any:
        return self.request("GET", "/health-check")[1]

    def wait_while(self, *states: str, seconds: float = 120) -> Any:
        """Poll the health check until it says something else than ``states``."""
        deadline = time.monotonic() + seconds
        while (health := self.health())["status"] in states:
            assert time.monotonic() < deadline, f"still {health['status']}: {self.log.read_text()[-2000:]}"
            time.sleep(0.05)
        return health


@contextmanager
def cog_server(
    folder: Path, environment: Mapping[str, str], python: str | Path = sys.executable
) -> Iterator[CogServer]:
    """Start coglet of ``python`` in ``folder``, wait until it answers, and end it with all its children."""
    source = (ROOT / "predict.py").read_text()
    shutil.copy(ROOT / "predict.py", folder)
    (folder / ".cog").mkdir()
    (folder / ".cog" / "openapi_schema.json").write_text(json.dumps(openapi_document(source)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [python, "-m", "cog.server.http", "--host", "127.0.0.1"],
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                # coglet starts its worker as ``python``
                "PATH": f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}",
                "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
                "PORT": str(port),
                **environment,
            },
        )
    server = CogServer(f"http://127.0.0.1:{port}", folder, process, log)
    try:
        deadline = time.monotonic() + 30
        while True:
            assert process.poll() is None, log.read_text()
            try:
                server.health()
                break
            except OSError:
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
