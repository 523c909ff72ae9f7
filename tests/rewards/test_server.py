import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from math import nan
from pathlib import Path

import httpx2
import pytest
from PIL import Image, PngImagePlugin

from rcgrpo.cli.parsing import UsageError
from rcgrpo.rewards import RemoteReward, RewardError, resolve_rewards, score, server
from rcgrpo.rewards.pictures import to_png

TOKEN = "let me in"
IMAGE, MASK, TARGET = (
    Image.new("RGB", (4, 4), (1, 2, 3)),
    Image.new("L", (4, 4), 255),
    Image.new("RGB", (4, 4), (4, 5, 6)),
)
SERVED = ["compbench_mini", *(f"served_rewards.{name}" for name in ("picky", "slow", "busy", "strict"))]


def start(*arguments):
    """The command itself; its process and address."""
    source = Path(server.__file__).parents[2]
    path = os.pathsep.join((str(source), str(Path(__file__).parent)))
    process = subprocess.Popen(
        [sys.executable, "-m", "rcgrpo.cli", "rewards", "serve", "--port", "0", *arguments],
        env={**os.environ, "PYTHONPATH": path, "RCGRPO_REWARD_TOKEN": TOKEN},
        stdout=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    assert line.startswith("serving "), line
    return process, line.split()[-1]


@pytest.fixture(scope="module")
def running():
    process, url = start("--reward_funcs", *SERVED, "--max_request_mb", "1", "--max_waiting", "1")
    yield process, url
    process.kill()
    process.communicate()


@pytest.fixture
def url(running):
    return running[1]


def post(url, body, token=TOKEN, content_type="application/json", **options):
    headers = {"Content-Type": content_type, **({"Authorization": f"Bearer {token}"} if token else {})}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with httpx2.Client(trust_env=False, verify=False) as client:
        return client.post(url + "/compute", content=content, headers=headers, timeout=10, **options)


def request(reward="slow", count=1, **changes):
    pictures = {"images": [to_png(IMAGE)] * count, "source_images": [to_png(IMAGE)] * count}
    return {"reward": reward, "prompts": ["x"] * count, **pictures, "masks": [to_png(MASK)] * count, **changes}


def run(reward, number, target=TARGET):
    count = len(number)
    columns = {"number": number, "edited_image": [target] * count}
    labels = [f"candidate {index}" for index in range(count)]
    return score(
        resolve_rewards(reward), ["x"] * count, [IMAGE] * count, [IMAGE] * count, [MASK] * count, columns, labels
    )


def remote(url, reward, **options):
    return RemoteReward(url, reward=reward, token=TOKEN, timeout=10, batch_size=4, **options)


def test_there_and_back(url):
    reward = remote(url, "picky", columns=("number", "edited_image"), value_range=(0, 9))
    scored = run(reward, [0.5, None, 1.5, 2.5, 3.5, "fail"])
    assert scored.values[[0, 2, 3, 4], 0].tolist() == [0.5, 1.5, 2.5, 3.5]
    assert scored.values[[1, 5], 0].isnan().all()
    assert [(f.sample_label, f.reason) for f in scored.failures] == [("candidate 5", "raised KeyError: 'fail'")]
    assert reward.faults == {"judge": 1}


def test_health(url):
    with httpx2.Client(trust_env=False, verify=False) as client:
        assert client.get(url + "/health").json() == {"status": "ok"}
        told = client.get(url + "/health", headers={"Authorization": f"Bearer {TOKEN}"}).json()
    assert told["rewards"]["picky"] == {"columns": ["number", "edited_image"], "range": [0, 9]}
    assert told["rewards"].keys() == {"compbench_mini", "picky", "slow", "busy", "strict"}


@pytest.mark.parametrize("token", [None, "", "let me", TOKEN + "!", "é"])
def test_token_is_demanded(url, token):
    if token == "é":
        headers = {"Content-Type": "application/json", "Authorization": "Bearer é".encode()}
        with httpx2.Client(trust_env=False, verify=False) as client:
            answer = client.post(url + "/compute", content=b"{}", headers=headers)
    else:
        answer = post(url, request(), token=token)
    assert answer.status_code == 401 and "Bearer" in answer.json()["error"]


def test_token_of_the_client_is_a_set_up_mistake(url):
    with pytest.raises(RewardError, match="is refused, check its set-up: http_401"):
        run(RemoteReward(url, reward="slow", token="wrong"), [1])


BROKEN = {
    "no JSON": (b"{", "the request is no JSON"),
    "deep JSON": (b"[" * 100_000, "the request is no JSON (nested deeper than 64)"),
    "deep JSON in a column": (
        request(columns={"number": [json.loads("[" * 100 + "]" * 100)]}),
        "the request is no JSON (nested deeper than 64)",
    ),
    "no object": ([], "got list, expected an object"),
    "no reward": (request(None), "reward: got None, expected one of compbench_mini, picky"),
    "unknown reward": (request("nobody"), "reward: got 'nobody'"),
    "no prompts": (request(prompts=[]), "prompts: expected a list of 1 to 1024"),
    "too many": (request(prompts=["x"] * 1025), "prompts: expected a list of 1 to 1024"),
    "wrong length": (request(masks=[]), "masks: expected a list of 1 entries"),
    "prompt of another kind": (request(prompts=[1]), "prompts: expected strings"),
    "no picture": (request(images=["AAAA"]), "images[0]: got 4 characters that do not begin like a PNG, expected"),
    "no picture in a column": (request(columns={"target": [{"png": 3}]}), "target[0]: got int, expected a base64 PNG"),
    "columns of another kind": (request(columns=[1]), "columns: got list"),
    "column that hides a field": (request(columns={"prompts": ["y"]}), "columns: got prompts"),
    "missing column": (request("picky"), "needs the column(s) number, edited_image"),
    "the reward says so": (request("strict", 2), "one at a time"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_mistakes_are_named(url, case):
    body, text = BROKEN[case]
    answer = post(url, body)
    assert answer.status_code == 400 and text in answer.json()["error"]


def test_size_and_type_of_requests_are_bounded(url):
    large = request(columns={"text": ["x" * (1 << 20)]})
    assert post(url, large).status_code == 413

    def chunks():  # without Content-Length
        for _ in range(32):
            yield b"x" * (1 << 16)

    with httpx2.Client(trust_env=False, verify=False) as client:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
        assert client.post(url + "/compute", content=chunks(), headers=headers).status_code == 413
    assert post(url, request(), content_type="text/plain").status_code == 415
    assert post(url, request("strict")).json() == {"rewards": [0.5], "failures": {}}


def ask_together(url, *rewards):
    """Answers of requests that are sent at the same time."""
    with ThreadPoolExecutor(len(rewards)) as pool:
        return list(pool.map(lambda reward: post(url, request(reward)), rewards))


def test_waiting_requests_are_bounded_and_told_when_to_come_again(url):
    answers = ask_together(url, "slow", "slow", "slow")
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429]
    (busy,) = (answer for answer in answers if answer.status_code == 429)
    assert int(busy.headers["Retry-After"]) >= 1 and "2 requests are being scored or waiting" in busy.json()["error"]


def test_client_comes_again_when_told(url):
    rewards = [remote(url, "slow", retries=9) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        scored = list(pool.map(lambda reward: run(reward, [1]), rewards))
    assert [batch.values.tolist() for batch in scored] == [[[1.0]]] * 3
    assert {kind for reward in rewards for kind in reward.faults} == {"http_429"}


def test_health_answers_while_a_reward_computes(url):
    with ThreadPoolExecutor(1) as pool, httpx2.Client(trust_env=False, verify=False) as client:
        answer = pool.submit(post, url, request("busy"))
        alive = 0
        while not answer.done():
            assert client.get(url + "/health", timeout=10).json() == {"status": "ok"}
            alive += not answer.done()
    assert answer.result().json()["rewards"] == [1.0] and alive >= 3


def in_process(app, *bodies):
    """Answers of an application in this process to requests at the same time."""

    async def all_of_them():
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            return await asyncio.gather(*(client.post("/compute", json=body, timeout=20) for body in bodies))

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("concurrency", [1, 2])
def test_so_many_requests_are_scored_at_once(concurrency):
    inside, most = [], []

    def plain(images, **columns):
        inside.append(1)
        time.sleep(0.05)
        most.append(len(inside))
        inside.pop()
        return [0.5] * len(images)

    async def waits(images, **columns):
        inside.append(1)
        await asyncio.sleep(0.05)
        most.append(len(inside))
        inside.pop()
        return [0.5] * len(images)

    for reward in (plain, waits):
        app = server.create_app(resolve_rewards(reward), concurrency=concurrency)
        answers = in_process(app, *[request(reward.__name__)] * 4)
        assert [answer.json()["rewards"] for answer in answers] == [[0.5]] * 4
        assert max(most) == concurrency
        most.clear()


def test_a_request_whose_caller_hung_up_is_not_scored():
    scored = []

    def counting(images, **columns):
        scored.append(len(images))
        return [0.5] * len(images)

    app = server.create_app(resolve_rewards(counting))
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/compute", "headers": headers, "query_string": b""}
    body = json.dumps(request("counting")).encode()
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])
    sent = []

    async def receive():
        return next(messages, {"type": "http.disconnect"})

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    assert scored == [] and sent[0]["status"] == 499


def limited(reward=lambda images, **columns: [0.5] * len(images), **limits):
    reward.__name__ = "half"
    return server.create_app(resolve_rewards(reward), **limits)


def white(pixels, text_bytes=0):
    """A PNG of one row that takes next to nothing, with so much text, packed, beside its pixels."""
    buffer, notes = io.BytesIO(), PngImagePlugin.PngInfo()
    for _ in range(text_bytes >> 19):
        notes.add_text("note", "x" * (1 << 19), zip=True)
    Image.new("L", (pixels, 1), 255).save(buffer, format="PNG", pnginfo=notes)
    return base64.b64encode(buffer.getvalue()).decode()


def test_pixels_of_all_pictures_together_are_bounded_before_any_is_decoded(monkeypatch):
    app, picture = limited(max_request_pixels=400), white(100)
    four = request("half", images=[picture], source_images=[picture], masks=[picture])
    attached = {**four, "columns": {"target": [{"png": picture}]}}
    (answer,) = in_process(app, attached)
    assert answer.status_code == 200
    monkeypatch.setattr(server, "from_png", None)  # what is refused is not decoded
    for changes in ({"masks": [white(101)]}, {"columns": {"target": [{"png": white(101)}]}}):
        (answer,) = in_process(app, {**attached, **changes})
        assert answer.status_code == 413 and "pictures have 401 pixels, expected 400 at most" in answer.json()["error"]


def test_pictures_bring_nothing_but_their_pixels():
    kept = []

    def keeps(images, target, **columns):
        kept.extend([*images, *target])
        return [0.5] * len(images)

    picture = white(4, 2 << 20)
    body = request("half", images=[picture], columns={"target": [{"png": picture}]})
    (answer,) = in_process(limited(keeps), body)
    assert answer.status_code == 200 and len(kept) == 2
    assert not any(getattr(image, "text", None) or image.info for image in kept)


def test_values_are_bounded_before_they_are_parsed(monkeypatch):
    monkeypatch.setattr(server, "MAX_VALUES", 100)
    assert [answer.status_code for answer in in_process(limited(), request("half"))] == [200]
    monkeypatch.setattr(server, "decode_json", None)
    for many in ([[]] * 100, [{}] * 100, [0] * 101):
        (answer,) = in_process(limited(), {**request("half"), "columns": {"number": [many]}})
        assert answer.status_code == 413 and "more than 100 values" in answer.json()["error"]


def test_few_requests_are_decoded_ahead(monkeypatch):
    decoded, most = [], []
    original = server._batch

    def batch(*arguments):
        decoded.append(1)
        most.append(len(decoded))
        return original(*arguments)

    def slow(images, **columns):
        time.sleep(0.02)
        decoded.pop()
        return [0.5] * len(images)

    monkeypatch.setattr(server, "_batch", batch)
    answers = in_process(limited(slow, concurrency=2), *[request("half")] * 9)
    assert [answer.json()["rewards"] for answer in answers] == [[0.5]] * 9
    assert max(most) == 3


def test_half_sent_requests_lose_their_place():
    process, url = start("--reward_funcs", "served_rewards.slow", "--max_waiting", "2", "--read_seconds", "1")
    try:
        host, port = url.removeprefix("http://").split(":")
        head = f"POST /compute HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
        began, held = time.monotonic(), [socket.create_connection((host, int(port))) for _ in range(3)]
        for connection in held:
            connection.sendall(head.encode())
            connection.settimeout(10)
        answers = []
        while (status := post(url, request()).status_code) != 200 and time.monotonic() - began < 60:
            answers.append(status)
            for connection in held:  # a byte now and then does not help
                with contextlib.suppress(OSError):
                    connection.sendall(b" ")
            time.sleep(0.1)
        assert status == 200 and set(answers) == {429}
        for connection in held:
            told = b""
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(1 << 16):  # until the server closes the connection
                    told += part
            assert told.startswith(b"HTTP/1.1 408 ") and b"of the request within 1 s" in told
            connection.close()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "limits", [{"concurrency": 0}, {"max_waiting": -1}, {"read_seconds": 0}, {"read_seconds": nan}]
)
def test_limits_that_cannot_be(limits):
    ((name, value),) = limits.items()
    with pytest.raises(ValueError, match=f"{name}: got {value}, expected"):
        server.create_app(resolve_rewards("background_keep"), **limits)


def test_zz_sigterm_lets_what_was_accepted_finish_and_takes_no_more(running):
    process, url = running
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(ask_together, url, "slow", "slow")  # one is scored, one waits
        while post(url, b"", content_type="text/plain").status_code != 429:  # 415 as long as there is room
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert [answer.json()["rewards"] for answer in answers.result()] == [[1.0]] * 2
    assert process.wait(30) in (0, -signal.SIGTERM)
    with pytest.raises(httpx2.ConnectError):
        post(url, request())


def test_other_machines_only_with_a_token():
    for host in ("0.0.0.0", "::", "192.168.1.7", "example.org"):
        with pytest.raises(ValueError, match="which other machines can reach, without a token"):
            server.serve(resolve_rewards("background_keep"), host, 0)


def test_command_line(monkeypatch, capsys):
    from rcgrpo.cli import rewards as command

    seen = []
    monkeypatch.setattr(server, "serve", lambda *given, **limits: seen.append((given, limits)))
    monkeypatch.delenv("RCGRPO_REWARD_TOKEN", raising=False)
    command.run(["serve", "--reward_funcs", "background_keep", "--port", "9"])
    ((rewards, host, port, token), limits) = seen[0]
    assert [reward.name for reward in rewards] == ["background_keep"] and (host, port, token) == ("127.0.0.1", 9, None)
    assert limits == {
        "max_request_bytes": 256 << 20,
        "max_request_pixels": 128 << 20,
        "read_seconds": 60,
        "concurrency": 1,
        "max_waiting": 32,
    }
    with pytest.raises(UsageError, match="unknown flag '--prot'; the nearest known one is --port"):
        command.run(["serve", "--prot", "9"])
    command.run([])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("clip_image"))
    assert "-1 to 1" in line and "columns: edited_image" in line and "LC-I" in line
