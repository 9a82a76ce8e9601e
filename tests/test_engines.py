"Engines on this machine, as the doctor and the client meet them."
import json
from http.server import BaseHTTPRequestHandler

import pytest
from mlcourse.assets import serving
from mlcourse.engines import ENGINES, engine_standin, find_engine
from mlcourse.llm import LLMError, OpenAIEngine


def server(answers: dict):
    "Answers each address with a status and a body."
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args): pass
        def do_GET(self):
            status, body = answers.get(self.path, (404, b"404 page not found"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)
    return serving(Handler)


@pytest.mark.parametrize("version", [(404, b""), (200, b"<html>"), (200, b"[]"), (200, b"{}"),
                                     (200, b'"0.1"'), (200, b"\xff\xfe"), (500, b"busy")])
def test_another_program_on_the_port(version):
    with server({"/api/version": version}) as url: assert not find_engine("Ollama", url).running


@pytest.mark.parametrize("models", [(404, b""), (200, b"{}"), (200, b'{"data": null}'),
                                    (200, b'{"data": [{"no": 1}]}'), (200, b"[1]")])
def test_a_list_of_models_that_cannot_be_read(models):
    with server({"/api/version": (200, b'{"version": "0.12.6"}'), "/v1/models": models}) as url:
        found = find_engine("Ollama", url)
    assert found.running and not found.models and "ollama pull" in str(found)


def test_the_doctor_names_a_running_ollama(monkeypatch):
    from mlcourse.doctor import Facts, judge
    with engine_standin("Ollama", ["llama3.1:8b", "猫:latest"], lambda asked: "") as url:
        monkeypatch.setenv("OLLAMA_HOST", url)
        said = str(find_engine("Ollama"))
    line = next(f for f in judge(Facts(ollama=said)) if f.name == "Ollama")
    assert line.status == "ok" and "llama3.1:8b, 猫:latest" in line.saw


@pytest.mark.parametrize("name", ENGINES)
def test_the_client_of_the_course_speaks_with_it(name, monkeypatch):
    "Past a proxy that answers nothing, in one piece and in a stream."
    for proxy in ("HTTP_PROXY", "ALL_PROXY"): monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    asked = []
    def reply(request):
        asked.append(request)
        return "Paris, 巴黎."
    with engine_standin(name, ["m"], reply) as url:
        engine = OpenAIEngine(f"{url}/v1", find_engine(name, url).models[0])
        streamed = "".join(engine.stream("Where?", 7))
        assert engine.chat("Where?", 7).text == streamed == "Paris, 巴黎."
        with pytest.raises(LLMError, match="It serves: m; you asked for 'other'"):
            OpenAIEngine(f"{url}/v1", "other").chat("Where?")
    assert asked[0]["max_tokens"] == 7 and json.dumps(asked[0]["messages"])
