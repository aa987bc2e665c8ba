"""Claim: a gateway adds less than 2 ms to a token at 2,000 tokens a second, and one process passes 20,000 on.

An engine that computes nothing sends tokens at a pace, whoever keeps up (`relay_engine`); a client of many streams
(`relay_client`) asks it directly, then through the gateway over gRPC and over HTTP. What the gateway adds is the
difference of the two quantiles in one run. Engine, gateway and client are processes of their own and share the host's
cores, so the gateway's CPU time a message says more than rates where these are too few.

With `--processes` it is measured how the tokens that are kept up with grow with gateway processes: as many engines,
all of them behind each gateway, a client for each gateway, so many tokens a second for each. At 16,000 that takes some
three cores a gateway; on fewer cores a lower rate still tells what a token costs each of them.

Run: python -m benchmarks.bench_gateway_relay [--short | --processes 1,2,4 TOKENS_A_SECOND]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import psutil

from benchmarks.command_line import parser_of
from benchmarks.record import Row, record, say
from benchmarks.relay_client import Heard, Task

THIS = "benchmarks.bench_gateway_relay"
STEP_SECONDS = 0.032
"""A decode step: 31 tokens a second and stream, so 64 streams are 2,000 tokens a second."""

NUM_FLOOD_STREAMS, NUM_FLOOD_TOKENS = 32, 2000
NUM_OPEN_STREAMS = 2000


@dataclass(frozen=True)
class Gateway:
    """A gateway process."""

    process: psutil.Process
    port: int
    http_port: int

    def cpu_seconds(self) -> float:
        """CPU time it has taken."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def resident_bytes(self) -> int:
        """Its memory."""
        return int(self.process.memory_info().rss)


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process for as long as it is wanted; both its outputs are one."""
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def an_engine(step_seconds: float) -> Iterator[int]:
    """An engine's port."""
    with started("benchmarks.relay_engine", str(step_seconds)) as process:
        yield int(next(_lines(process)))


@contextlib.contextmanager
def a_gateway(*engine_ports: int) -> Iterator[Gateway]:
    """A gateway before some engines, as `python -m services.gateway` runs it."""
    options = ("--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--adapter-store", "127.0.0.1:1")
    engines = ",".join(f"127.0.0.1:{port}" for port in engine_ports)
    with started("services.gateway", *options, "--engines", engines) as process:
        entries = (json.loads(line) for line in _lines(process) if line.startswith("{"))
        ports = next(entry for entry in entries if entry["message"] == "listening")
        threading.Thread(target=lambda: list(_lines(process)), daemon=True).start()
        yield Gateway(psutil.Process(process.pid), ports["port"], ports["http_port"])


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    return iter(process.stdout)


def ask(task: Task) -> Heard:
    """A client's run, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.relay_client", json.dumps(dataclasses.asdict(task))]
    return Heard(**json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))


def quantile_ms(seconds: Sequence[float], share: float) -> float:
    """A quantile in milliseconds."""
    return sorted(seconds)[int(share * (len(seconds) - 1))] * 1e3


def _tell(row: Row) -> Row:
    say(json.dumps(row))
    return row


def measure_added_latency(seconds: float) -> Iterator[Row]:
    """At 2,000 tokens a second: tokens and first tokens, directly and through the gateway."""
    num_tokens = int(seconds / STEP_SECONDS)
    with an_engine(STEP_SECONDS) as engine_port, a_gateway(engine_port) as gateway:
        ports = {"engine": engine_port, "gateway": gateway.port, "http": gateway.http_port}
        direct: dict[str, float] = {}
        for api, port in ports.items():
            cpu = gateway.cpu_seconds()
            heard = ask(Task(api, (port,), 64, num_tokens, num_probes=int(20 * seconds), num_warm_up=31))
            cpu = gateway.cpu_seconds() - cpu
            delays = {
                f"{what}_ms_{name}": round(quantile_ms(values, share), 2)
                for what, values in (("token", heard.token_seconds), ("first_token", heard.first_seconds))
                for name, share in (("p50", 0.5), ("p99", 0.99))
            }
            direct = direct or delays
            row: Row = {
                "measure": "latency at 2,000 tokens/s",
                "through": api,
                "streams": 64,
                **_rates(heard),
                **delays,
            }
            if api != "engine":
                row |= {f"added_{key}": round(value - direct[key], 2) for key, value in delays.items()}
                row["gateway_cpu_share"] = round(cpu / (seconds + STEP_SECONDS), 2)
            yield _tell(row)


def measure_sustained(seconds: float, rates: Sequence[int]) -> Iterator[Row]:
    """Tokens a second that one gateway keeps up with: those that come late are merged into fewer messages.

    `steady`: once all streams run. They are all asked for at once, and the last first token is as late as it says.
    """
    num_tokens = int(seconds / STEP_SECONDS)
    for rate in rates:
        num_streams = round(rate * STEP_SECONDS)
        with an_engine(STEP_SECONDS) as engine_port, a_gateway(engine_port) as gateway:
            cpu = gateway.cpu_seconds()
            heard = ask(Task("gateway", (gateway.port,), num_streams, num_tokens, num_warm_up=31))
            cpu = gateway.cpu_seconds() - cpu
        yield _tell(
            {
                "measure": "sustained",
                "offered_tokens_per_s": rate,
                "streams": num_streams,
                **_rates(heard),
                "steady_tokens_per_s": heard.steady_tokens_per_s and round(heard.steady_tokens_per_s),
                "last_first_token_s": round(heard.begin_seconds, 2),
                "tokens_per_message": round(heard.num_tokens / heard.num_messages, 2),
                "token_ms_p50": round(quantile_ms(heard.token_seconds, 0.5), 1),
                "token_ms_p99": round(quantile_ms(heard.token_seconds, 0.99), 1),
                "gateway_cpu_us_per_token": round(cpu / (num_streams * num_tokens) * 1e6, 1),
            }
        )


def measure_processes(seconds: float, rate: int, counts: Sequence[int]) -> Iterator[Row]:
    """Tokens a second that several gateways keep up with, `rate` for each; engines are shared, clients are not."""
    num_streams, num_tokens = round(rate * STEP_SECONDS), int(seconds / STEP_SECONDS)
    for count in counts:
        with contextlib.ExitStack() as held:
            engine_ports = [held.enter_context(an_engine(STEP_SECONDS)) for _ in range(count)]
            gateways = [held.enter_context(a_gateway(*engine_ports)) for _ in range(count)]
            tasks = [Task("gateway", (g.port,), num_streams, num_tokens, num_warm_up=31) for g in gateways]
            cpu = sum(gateway.cpu_seconds() for gateway in gateways)
            heard = list(held.enter_context(ThreadPoolExecutor(count)).map(ask, tasks))
            cpu = sum(gateway.cpu_seconds() for gateway in gateways) - cpu
        delays = [delay for one in heard for delay in one.token_seconds]
        yield _tell(
            {
                "measure": "processes",
                "gateways": count,
                "offered_tokens_per_s": count * rate,
                "streams": count * num_streams,
                "steady_tokens_per_s": round(sum(one.steady_tokens_per_s or 0.0 for one in heard)),
                "tokens_per_message": round(len(delays) / sum(one.num_messages for one in heard), 2),
                "token_ms_p50": round(quantile_ms(delays, 0.5), 1),
                "token_ms_p99": round(quantile_ms(delays, 0.99), 1),
                "gateway_cpu_us_per_token": round(cpu / (count * num_streams * num_tokens) * 1e6, 1),
            }
        )


def measure_flood(num_tokens: int) -> Iterator[Row]:
    """As fast as they are taken: directly, through one gateway, and through two. A gateway that is behind merges."""
    with an_engine(0.0) as engine_port, a_gateway(engine_port) as one, a_gateway(engine_port) as two:
        targets = [("engine", [engine_port], []), ("gateway", [one.port], [one]), ("http", [one.http_port], [one])]
        targets.append(("gateway", [one.port, two.port], [one, two]))
        for api, ports, gateways in targets:
            cpu = sum(gateway.cpu_seconds() for gateway in gateways)
            heard = ask(Task(api, tuple(ports), NUM_FLOOD_STREAMS, num_tokens))
            cpu = sum(gateway.cpu_seconds() for gateway in gateways) - cpu
            row: Row = {
                "measure": "as fast as they go",
                "through": api,
                "gateways": len(gateways),
                "streams": NUM_FLOOD_STREAMS,
                "messages_per_s": round(heard.num_messages / heard.seconds),
                "tokens_per_message": round(heard.num_tokens / heard.num_messages, 2),
            }
            if gateways:
                row["gateway_cpu_us_per_message"] = round(cpu / heard.num_messages * 1e6, 1)
                row["gateway_cpu_us_per_token"] = round(cpu / heard.num_tokens * 1e6, 1)
            yield _tell(row)


def measure_memory(num_streams: int) -> Iterator[Row]:
    """What open streams take in a gateway, each with a token a second."""
    with an_engine(1.0) as engine_port, a_gateway(engine_port) as gateway:
        ask(Task("gateway", (gateway.port,), 64, 3))  # warms up
        before, highest = gateway.resident_bytes(), 0
        over = threading.Event()

        def watch() -> None:
            nonlocal highest
            while not over.wait(0.1):
                highest = max(highest, gateway.resident_bytes())

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            heard = ask(Task("gateway", (gateway.port,), num_streams, 8))
        finally:
            over.set()
            watching.join()
    yield _tell(
        {
            "measure": "memory of open streams",
            "streams": num_streams,
            "resident_mib_before": round(before / 2**20, 1),
            "resident_mib": round(highest / 2**20, 1),
            "kib_per_stream": round((highest - before) / num_streams / 2**10, 1),
            **_rates(heard),
        }
    )


def _rates(heard: Heard) -> Row:
    return {"tokens_per_s": round(heard.num_tokens / heard.seconds)}


def main(arguments: Sequence[str]) -> None:
    """Measures and records; a short run is only shown."""
    options = chosen(arguments)
    if options.processes:
        counts, rate = options.processes
        rows = list(measure_processes(20.0, rate, counts))
        command = f"python -m {THIS} --processes {','.join(map(str, counts))} {rate}"
        say(f"recorded in {record('gateway_processes', command, rows)}")
    else:
        measure_one(options.short)


def chosen(arguments: Sequence[str]) -> argparse.Namespace:
    """The options: `short`, and of `processes` the counts and the rate, or None."""
    parser = parser_of(__doc__)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--short", action="store_true", help="a fast run that is only shown")
    names = ("COUNTS", "TOKENS_A_SECOND")
    either.add_argument("--processes", nargs=2, metavar=names, help="how many gateways, as 1,2,4; the rate of each")
    options = parser.parse_args(arguments)
    if options.processes:
        counts, rate = options.processes
        try:
            options.processes = [int(count) for count in counts.split(",")], int(rate)
        except ValueError as error:
            parser.error(f"--processes: {error}")
    return options


def measure_one(is_short: bool) -> None:
    """Everything of one gateway."""
    seconds, rates = (4.0, (8_000,)) if is_short else (20.0, (8_000, 12_000, 16_000, 20_000, 24_000))
    rows: list[Any] = [
        *measure_added_latency(seconds),
        *measure_flood(NUM_FLOOD_TOKENS // (4 if is_short else 1)),
        *measure_memory(NUM_OPEN_STREAMS),
        *measure_sustained(seconds, rates),
    ]
    if not is_short:
        say(f"recorded in {record('gateway_relay', f'python -m {THIS}', rows)}")


if __name__ == "__main__":
    main(sys.argv[1:])
