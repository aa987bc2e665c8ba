"""A core without a model, as a child process: `python fake_core.py FD MODE [--pace SECONDS] [--log FILE]`.

It answers each Generate with its prompt's ids over and over, one token a step, and notes in FILE what it was sent.
In mode `slow-start` it is not ready before a file beside FILE, with the suffix `.go`, is there.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import sys
import time
from pathlib import Path

from services.engine.core.launch import CANNOT_START
from services.engine.messages import (
    LENGTH,
    Abort,
    Adapter,
    AdapterLoaded,
    CoreLoad,
    CoreReady,
    Generate,
    Ping,
    Pong,
    StepReport,
    ToCore,
    TokenEvent,
    frame,
    to_core_decoder,
)


class FakeCore:
    def __init__(self, connection: socket.socket, mode: str, pace: float, log: str) -> None:
        self.connection = connection
        self.mode = mode
        self.pace = pace
        self.log = open(log, "a", buffering=1) if log else None  # noqa: SIM115
        self.may_start = Path(log or "core").with_suffix(".go")
        self.unparsed = b""
        self.running: dict[int, tuple[Generate, int]] = {}
        self.steps = 0

    def run(self) -> None:
        while self.mode == "slow-start" and not self.may_start.exists():
            time.sleep(0.01)
        ready = CoreReady(num_pages=100, max_model_len=1 << 20, max_running=64, vocab_size=600)
        self.connection.sendall(frame(ready))
        if self.mode == "deaf":
            time.sleep(3600)
        if self.mode == "garbage":
            self.connection.sendall(LENGTH.pack(5) + b"\xc1junk")
            time.sleep(3600)
        while self.receive():
            self.step()

    def receive(self) -> bool:
        """Takes what has come; waits for something if nothing runs. False at the end of file."""
        patience = self.pace if self.running else None
        if not select.select([self.connection], [], [], patience)[0]:
            return True
        data = self.connection.recv(1 << 20)
        self.unparsed += data
        while len(self.unparsed) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(self.unparsed)[0]
            if len(self.unparsed) < end:
                break
            self.take(to_core_decoder.decode(self.unparsed[LENGTH.size : end]))
            self.unparsed = self.unparsed[end:]
        return bool(data)

    def take(self, message: ToCore) -> None:
        if isinstance(message, Ping):
            self.connection.sendall(frame(Pong()))
            return
        if self.log:
            self.log.write(f"{type(message).__name__} {message.request_id}\n")
        if isinstance(message, Generate):
            if self.mode == "die-on-request":
                os.kill(os.getpid(), 9)
            self.running[message.request_id] = (message, 0)
        elif isinstance(message, Abort):
            self.running.pop(message.request_id, None)
        else:
            loaded = AdapterLoaded(message.adapter, 0.5, 1000)
            answer = [(message.request_id, 0.5)]
            self.connection.sendall(frame(StepReport(load=self.load(), loaded=[loaded], prefetched=answer)))

    def load(self) -> CoreLoad:
        return CoreLoad(num_running=len(self.running), num_steps_total=self.steps, num_free_pages=50)

    def step(self) -> None:
        if not self.running:
            return
        self.steps += 1
        tokens = []
        for core_id, (message, count) in list(self.running.items()):
            is_last = count + 1 >= message.stop.max_tokens
            token_id = message.prompt_ids[count % len(message.prompt_ids)]
            tokens.append(TokenEvent(core_id, token_id, finish="length" if is_last else None))
            if is_last:
                del self.running[core_id]
            else:
                self.running[core_id] = (message, count + 1)
        first = [AdapterLoaded(Adapter("first@1", "sha256:" + "1" * 64), 0.1, 10)] if self.steps == 1 else []
        self.connection.sendall(frame(StepReport(load=self.load(), tokens=tokens, loaded=first)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("fd", type=int)
    parser.add_argument("mode")
    parser.add_argument("--pace", type=float, default=0.0)
    parser.add_argument("--log", default="")
    settings = parser.parse_args()
    if settings.mode == "bad-checkpoint":
        sys.exit("the checkpoint holds no weights\n")
    if settings.mode == "usage":
        said = ["loading", f"{CANNOT_START}num_pages is too small", "the core ends: one of two processes is gone"]
        sys.stderr.writelines(json.dumps({"level": "CRITICAL", "message": message}) + "\n" for message in said)
        sys.exit(2)
    if settings.mode == "usage-without-a-word":
        sys.stderr.write("usage: engine-core\n")
        sys.exit(2)
    connection = socket.socket(fileno=settings.fd)
    FakeCore(connection, settings.mode, settings.pace, settings.log).run()


if __name__ == "__main__":
    main()
