"""What a slow judge costs a step: rollouts alone, a judge that is waited for, a judge that works beside them.

    python benchmarks/overlap.py                        # kontext-tiny, a window of 8 micro-batches
    python benchmarks/overlap.py --window 16 --rounds 9 --generations 12

The real trainer runs `train()` on the embedded editor. Its reward is a `RemoteReward` whose server, a process of its
own, only sleeps, for one request after the other, so it takes no computing time from the rollouts and is not faster for
being asked twice at once. A round is three steps on end, so that all three meet
the same load on the machine; the order of the last two alternates:

- `alone`: a constant in place of the judge. What its rollouts took sets how long the judge sleeps in this round.
- `serial`: each rollout is followed by its judge, and the next one waits for that.
- `overlapped`: as `RCGRPOTrainer` does it, unchanged.

Learning is left out (`training_step` ends after the scores), because what a judge adds must not hide behind backward
passes. The judge is as slow as a rollout, hence `serial` is near 2. With W micro-batches in a window the last one's
judge has no rollout to work beside, so `overlapped` cannot be under 1 + 1/W here; in training, that tail runs beside
the learning from the micro-batches before. The first round warms up and does not count. A step's time goes from
`on_step_begin` to `on_step_end`; the table holds medians over rounds, and of the ratios within each round. Its last
column tells how much slower the rollouts themselves were for sharing the processor with the client.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import defaultdict
from concurrent.futures import wait
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from statistics import median
from typing import Any

MODES = ("alone", "serial", "overlapped")
SERVE = "--serve-judge"


class Judge(BaseHTTPRequestHandler):
    """Sleeps and answers; `POST /sleep` with a number of seconds sets how long."""

    protocol_version = "HTTP/1.1"
    seconds = 0.0
    working = threading.Lock()

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/sleep":
            type(self).seconds, answer = body, None
        else:
            with self.working:
                time.sleep(self.seconds)
            count = len(body["prompts"])
            answer = {"rewards": [index / count for index in range(count)]}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def serve() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


def measure(url: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each round's step, by mode, and of its mean rollout, by mode and `rollout`."""
    from diffusers import FluxKontextPipeline
    from peft import LoraConfig
    from transformers import TrainerCallback

    from rcgrpo import RCGRPOConfig, RCGRPOTrainer, compbench_mini
    from rcgrpo.rewards import RemoteReward, resolve_rewards
    from rcgrpo.tiny import CALL, RESOLUTION, WEIGHTS

    def constant(images: list[Any], **columns: Any) -> list[float]:
        return [0.5] * len(images)

    class RolloutsOnly(RCGRPOTrainer):
        """Makes and scores every window as always, then learns nothing from it."""

        mode = "alone"
        rollouts: list[float]

        def make_groups(self, *arguments: Any, **keywords: Any) -> Any:
            began = time.perf_counter()
            groups = super().make_groups(*arguments, **keywords)
            self.rollouts.append(time.perf_counter() - began)
            return groups

        def _submit(self, *arguments: Any) -> Any:
            pending = super()._submit(*arguments)
            if self.mode == "serial":
                wait([pending.future])
            return pending

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            model.train()
            groups = self._prepare_inputs(inputs)
            self._step += 1
            return groups[0].scores.new_zeros(())

    taken: dict[str, list[float]] = defaultdict(list)

    class Rounds(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
            number, place = divmod(state.global_step, len(MODES))
            order = MODES if number % 2 else (MODES[0], MODES[2], MODES[1])
            trainer.mode, trainer.rollouts = order[place], []
            trainer.rewards = resolve_rewards(constant if trainer.mode == "alone" else judge)
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
            taken[trainer.mode].append(time.perf_counter() - self.began)
            assert len(trainer.rollouts) == options.window
            rollout = sum(trainer.rollouts) / len(trainer.rollouts)
            taken[f"{trainer.mode} rollout"].append(rollout)
            if trainer.mode == "alone":
                tell(url, rollout)

    judge = RemoteReward(url, "judge", batch_size=max(1, options.batch * options.generations), required=True)
    pipe = FluxKontextPipeline.from_pretrained(str(WEIGHTS))
    pipe.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as folder:
        args = RCGRPOConfig(
            folder,
            resolution=RESOLUTION,
            max_sequence_length=CALL["max_sequence_length"],
            num_inference_steps=CALL["num_inference_steps"],
            num_generations=options.generations,
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=options.window,
            max_steps=len(MODES) * (options.rounds + 1),
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
        )
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"])
        rows = compbench_mini("train", max(64, options.window * options.batch), RESOLUTION)
        trainer = RolloutsOnly(pipe, judge, args, rows, peft_config=lora, callbacks=[Rounds()])
        trainer.train()
    if judge.faults:
        raise RuntimeError(f"the judge failed ({dict(judge.faults)}), so these times mean nothing")
    return {name: values[1:] for name, values in taken.items()}


def tell(url: str, seconds: float) -> None:
    request = urllib.request.Request(url + "/sleep", json.dumps(seconds).encode())
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10).close()


def table(taken: dict[str, list[float]], window: int) -> str:
    lines = [
        "| step | s (median) | ratio to rollouts alone (median, least to most) | a rollout's |",
        "|---|---|---|---|",
    ]
    for mode in MODES:
        steps = ratios(taken[mode], taken["alone"])
        rollouts = ratios(taken[f"{mode} rollout"], taken["alone rollout"])
        spread = f"{median(steps):.3f} ({min(steps):.3f} to {max(steps):.3f})"
        lines.append(f"| {mode} | {median(taken[mode]):.3f} | {spread} | {median(rollouts):.3f} |")
    return "\n".join(
        [
            *lines,
            "",
            f"{len(taken['alone'])} rounds; W = {window} micro-batches a step; a rollout, and so the judge, took "
            f"{median(taken['alone rollout']):.3f} s (median). The least possible for `overlapped` is 1 + 1/W = "
            f"{1 + 1 / window:.3f}.",
        ]
    )


def ratios(values: list[float], to: list[float]) -> list[float]:
    return [value / other for value, other in zip(values, to, strict=True)]


def main() -> None:
    if sys.argv[1:] == [SERVE]:
        return serve()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=8, help="gradient_accumulation_steps, W")
    parser.add_argument("--batch", type=int, default=1, help="edits in a micro-batch")
    parser.add_argument("--generations", type=int, default=12, help="candidates of an edit")
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up")
    options = parser.parse_args()
    process = subprocess.Popen([sys.executable, __file__, SERVE], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        taken = measure(f"http://127.0.0.1:{int(process.stdout.readline())}", options)
    finally:
        process.kill()
        process.communicate()
    print(table(taken, options.window))


if __name__ == "__main__":
    main()
