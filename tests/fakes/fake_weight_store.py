"""A store of weights that the test plays: a real gRPC server on loopback that answers each fetch as it is told."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
from slora.adapter_store.v1 import adapter_pb2, adapter_store_pb2, adapter_store_pb2_grpc

from services.common.errors import Reason, SloraError
from services.common.grpc_errors import to_grpc_status
from services.common.grpc_server import SERVER_OPTIONS
from services.common.packed_digest import packed_digest
from tests.fakes.fake_model import digest_of

DIGEST = digest_of("a")
CHUNK = 1000
SEED = random.SystemRandom().randrange(1 << 32)


def weights_and_manifest() -> tuple[bytes, adapter_pb2.PackedManifest]:
    layer_elems = 3 * 8 * 16 + 3 * 8 * 32 + 5 * 32 * 2
    weights = random.Random(SEED).randbytes(2 * layer_elems * 4)
    modules = [
        adapter_pb2.PackedModule(
            target_module=adapter_pb2.TARGET_MODULE_Q,
            rank=24,
            in_features=15,
            out_features=32,
            lora_a_offset=0,
            lora_b_offset=24 * 16,
        ),
        adapter_pb2.PackedModule(
            target_module=adapter_pb2.TARGET_MODULE_DOWN,
            rank=5,
            in_features=32,
            out_features=32,
            lora_a_offset=24 * 48,
            lora_b_offset=24 * 48 + 5 * 32,
        ),
    ]
    manifest = adapter_pb2.PackedManifest(
        digest=DIGEST,
        packed_digest=packed_digest(weights),
        element_type=adapter_pb2.ELEMENT_TYPE_FLOAT32,
        tile_elems=16,
        num_layers=2,
        layer_elems=layer_elems,
        packed_bytes=len(weights),
        layers=[adapter_pb2.PackedLayer(modules=modules), adapter_pb2.PackedLayer()],
    )
    return weights, manifest


Answer = Callable[[adapter_store_pb2.FetchAdapterRequest, grpc.ServicerContext], Iterator[object]]


class FakeStore(adapter_store_pb2_grpc.AdapterStoreServiceServicer):
    """Answers call number n with `script[n]`, and rightly when the script is over."""

    def __init__(self) -> None:
        self.weights, self.manifest = weights_and_manifest()
        self.script: list[Answer] = []
        self.requests: list[adapter_store_pb2.FetchAdapterRequest] = []
        self.ended = threading.Semaphore(0)
        self.replicas: list[adapter_store_pb2.Replica] = []
        self.is_current = True

    def FetchAdapter(self, request, context):  # type: ignore[no-untyped-def]
        self.requests.append(request)
        context.add_callback(self.ended.release)
        number = len(self.requests) - 1
        answer = self.script[number] if number < len(self.script) else self.right
        for part in answer(request, context):
            if isinstance(part, SloraError):
                context.abort_with_status(to_grpc_status(part))
            elif isinstance(part, adapter_pb2.PackedManifest):
                yield adapter_store_pb2.FetchAdapterResponse(manifest=part)
            else:
                yield adapter_store_pb2.FetchAdapterResponse(chunk=part)

    def ListReplicas(self, request, context):  # type: ignore[no-untyped-def]
        if not self.replicas:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "a store of before there were replicas")
        return adapter_store_pb2.ListReplicasResponse(replicas=self.replicas, num_homes=1, is_current=self.is_current)

    def right(self, request, context):  # type: ignore[no-untyped-def]
        yield self.manifest
        for start in range(request.offset, len(self.weights), CHUNK):
            yield self.weights[start : start + CHUNK]

    def cut_after(self, num_bytes: int, how: SloraError | None) -> Answer:
        def answer(request, context):  # type: ignore[no-untyped-def]
            yield self.manifest
            sent = 0
            for start in range(request.offset, len(self.weights), CHUNK):
                if sent >= num_bytes:
                    break
                yield self.weights[start : start + CHUNK]
                sent += CHUNK
            if how is not None:
                yield how

        return answer


UNAVAILABLE = SloraError(Reason.BLOB_STORE_UNAVAILABLE, "S3 is away", bucket="b")


def hang(request: object, context: grpc.ServicerContext) -> Iterator[object]:
    ended = threading.Event()
    context.add_callback(ended.set)
    ended.wait(20)
    return iter(())


def iter_then_hang(
    parts: list[object], request: adapter_store_pb2.FetchAdapterRequest, context: grpc.ServicerContext
) -> Iterator[object]:
    yield from parts
    hang(request, context)


@contextlib.contextmanager
def served(store: FakeStore, port: int = 0) -> Iterator[str]:
    """The store's address, for the length of a block."""
    server = grpc.server(futures.ThreadPoolExecutor(8), options=SERVER_OPTIONS)
    adapter_store_pb2_grpc.add_AdapterStoreServiceServicer_to_server(store, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()
