"""The fault proxy on real sockets: each fault does what it says, and every byte is counted."""

import random
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import BenchError
from bench.faults import NO_FAULTS, FaultProxy, Faults, Traffic
from bench.faults.control import control
from bench.faults.values import RequestCounter

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"


class Echo:
    """Sends back what it gets; remembers in what pieces it came, and how each connection ended."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.pieces, self.ends = [], []
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self):
        while True:
            try:
                peer, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.echo, args=(peer,), daemon=True).start()

    def echo(self, peer):
        with peer:
            try:
                while piece := peer.recv(1 << 16):
                    self.pieces.append(piece)
                    peer.sendall(piece)
                self.ends.append("closed")
            except OSError:
                self.ends.append("reset")

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()


@pytest.fixture
def echo():
    made = Echo()
    yield made
    made.close()


@pytest.fixture
def proxy(echo):
    with FaultProxy(echo.url, seed=7) as made:
        yield made


@contextmanager
def call(proxy, timeout_s=20.0):
    with socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2])), timeout=timeout_s) as caller:
        yield caller


def read(caller, size):
    got = b""
    while len(got) < size and (piece := caller.recv(size - len(got))):
        got += piece
    return got


def until(holds, limit_s=20.0):
    ends = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.005)


def timed(caller, data):
    """Milliseconds until `data` came back."""
    began = time.perf_counter()
    caller.sendall(data)
    assert read(caller, len(data)) == data
    return 1e3 * (time.perf_counter() - began)


def test_without_a_fault_bytes_pass_and_are_counted(echo, proxy):
    data = bytes(range(256)) * 1000
    with call(proxy) as caller:
        threading.Thread(target=caller.sendall, args=(data,), daemon=True).start()
        assert read(caller, len(data)) == data
        caller.shutdown(socket.SHUT_WR)
        assert caller.recv(1) == b""
    until(lambda: echo.ends == ["closed"])
    assert proxy.traffic == Traffic(1, 0, len(data), len(data))


def test_latency_is_added_each_way(proxy):
    """At least what was asked for; how much more a busy machine adds is not tested."""
    with call(proxy) as caller:
        proxy.set(Faults(latency_ms=40))
        assert timed(caller, b"x") >= 80
        proxy.set(up=Faults(latency_ms=40), down=NO_FAULTS)
        assert timed(caller, b"x") >= 40


def test_jitter_keeps_the_order(echo):
    faults = Faults(latency_ms=3, jitter_ms=3)
    with FaultProxy(echo.url, seed=1) as proxy, call(proxy) as caller:
        proxy.set(faults)
        for number in range(100):
            caller.sendall(b"%03d" % number)
        assert read(caller, 300) == b"".join(b"%03d" % number for number in range(100))


@given(st.integers(0, 1000), st.floats(0, 50), st.floats(0, 50))
def test_delays_lie_in_their_range_and_repeat(seed, latency_ms, jitter_ms):
    faults = Faults(latency_ms=latency_ms, jitter_ms=jitter_ms)
    delays = [faults.delay_s(random.Random(seed)) for _ in range(2)]
    assert delays[0] == delays[1]
    assert max(0.0, latency_ms - jitter_ms) / 1e3 - 1e-9 <= delays[0] <= (latency_ms + jitter_ms) / 1e3 + 1e-9


def test_a_rate_bounds_how_fast_bytes_come(proxy):
    with call(proxy) as caller:
        proxy.set(down=Faults(bytes_per_s=20_000))
        assert timed(caller, bytes(4000)) >= 190


def test_slices_arrive_in_packets_of_their_own(echo, proxy):
    proxy.set(up=Faults(slice_bytes=3, slice_gap_ms=5))
    with call(proxy) as caller:
        timed(caller, b"abcdefghij")
    assert echo.pieces[0] == b"abc"
    assert len(echo.pieces) > 1


def test_a_reset_after_so_many_bytes(echo, proxy):
    proxy.set(down=Faults(reset_after_bytes=4))
    with call(proxy) as caller:
        caller.sendall(b"abcdefgh")
        until(lambda: proxy.traffic.received_bytes == 4)
        with pytest.raises(ConnectionResetError):
            read(caller, 5)
    until(lambda: echo.ends == ["reset"])


def test_a_timeout_lets_nothing_pass_and_closes(echo, proxy):
    proxy.set(up=Faults(timeout_ms=30))
    with call(proxy) as caller:
        began = time.perf_counter()
        caller.sendall(b"abc")
        assert caller.recv(1) == b""
        assert time.perf_counter() - began >= 0.03
    assert echo.pieces == []


def test_corruption_changes_bytes_and_repeats_with_the_seed(echo):
    def garbled(seed):
        with FaultProxy(echo.url, seed=seed) as proxy, call(proxy) as caller:
            proxy.set(down=Faults(corrupt_share=0.2))
            caller.sendall(bytes(1000))
            return read(caller, 1000)

    first = garbled(1)
    assert 100 < sum(byte != 0 for byte in first) < 300  # binomial: 200 ± 13; 100 is 8 deviations away
    assert (garbled(1), garbled(2) == first) == (first, False)


def test_a_black_hole_swallows_and_counts_and_the_connection_stays_silent(echo, proxy):
    proxy.set(Faults(black_hole=True))
    with call(proxy, timeout_s=0.1) as caller:
        caller.sendall(b"abc")
        until(lambda: proxy.traffic.sent_bytes == 3)
        with pytest.raises(TimeoutError):
            caller.recv(1)
        proxy.set(NO_FAULTS)
        caller.sendall(b"def")
        with pytest.raises(TimeoutError):
            caller.recv(1)
    with call(proxy) as other:
        assert timed(other, b"ghi") > 0
    assert echo.pieces == [b"ghi"]
    assert proxy.traffic.received_bytes == 3


def test_stopped_it_refuses_and_resets_and_resumed_it_is_there_on_the_same_port(echo, proxy):
    with call(proxy) as caller:
        timed(caller, b"abc")
        proxy.stop()
        with pytest.raises(ConnectionResetError):
            caller.recv(1)
        with pytest.raises(ConnectionRefusedError), call(proxy):
            pass
    proxy.stop()
    proxy.resume()
    proxy.resume()
    with call(proxy) as caller:
        timed(caller, b"def")
    until(lambda: echo.ends == ["reset", "closed"])


def test_an_answer_of_its_own_never_reaches_the_target(echo, proxy):
    proxy.set(up=Faults(answer=b"HTTP/1.1 500 no\r\nContent-Length: 0\r\n\r\n"))
    with call(proxy) as caller:
        caller.sendall(HEAD)
        assert read(caller, 15) == b"HTTP/1.1 500 no"
    assert echo.pieces == []
    assert proxy.traffic.requests == 1


def test_without_a_target_connections_are_reset():
    with FaultProxy() as proxy:
        with pytest.raises(ConnectionResetError), call(proxy) as caller:
            caller.recv(1)
        assert proxy.traffic.connections == 1


def test_a_dead_target_resets(echo, proxy):
    proxy.target = "http://127.0.0.1:9"
    with pytest.raises(ConnectionResetError), call(proxy) as caller:
        caller.recv(1)


def test_who_hangs_up_is_seen_at_the_other_end(echo, proxy):
    with call(proxy) as caller:
        timed(caller, b"abc")
    until(lambda: echo.ends == ["closed"])


def test_requests_are_counted_on_one_connection(proxy):
    with call(proxy) as caller:
        for _ in range(3):
            timed(caller, HEAD + b"GET /healthz HTTP/1.1\r\n\r\n")
    assert (proxy.traffic.connections, proxy.traffic.requests) == (1, 3)


@given(st.lists(st.sampled_from([HEAD, b"GET / HTTP/1.1\r\n\r\n", b'{"text": "POST / HTTP/1.1"}'])), st.integers(1, 40))
def test_heads_are_counted_however_the_stream_is_cut(parts, size):
    stream, counter = b"".join(parts), RequestCounter()
    found = sum(counter.feed(stream[at : at + size]) for at in range(0, len(stream), size))
    assert found == parts.count(HEAD)


@given(st.binary(min_size=1), st.integers(1, 9), st.floats(10, 1e5))
def test_pieces_join_to_what_was_cut(data, slice_bytes, rate):
    for faults in (NO_FAULTS, Faults(slice_bytes=slice_bytes), Faults(bytes_per_s=rate)):
        assert b"".join(faults.pieces(data)) == data
    assert max(map(len, Faults(slice_bytes=slice_bytes, bytes_per_s=rate).pieces(data))) <= slice_bytes


@pytest.mark.parametrize(
    "values",
    [{"latency_ms": -1}, {"bytes_per_s": 0}, {"corrupt_share": 1.5}, {"latency_ms": float("nan")}, {"lag": 1},
     {"latency_ms": "much"}, {"latency_ms": True}, {"slice_bytes": 1.5}],
)  # fmt: skip
def test_a_senseless_fault_is_refused_by_name(values):
    with pytest.raises(BenchError, match=next(iter(values))):
        Faults.of(values)


def test_faults_are_read_from_json():
    assert Faults.of({"latency_ms": 5, "bytes_per_s": None, "answer": "no"}) == Faults(latency_ms=5, answer=b"no")


def test_traffic_since():
    assert Traffic(3, 2, 10, 20).since(Traffic(1, 1, 4, 5)) == Traffic(2, 1, 6, 15)


def test_a_port_that_is_taken_is_said():
    with FaultProxy() as first, pytest.raises(BenchError, match="cannot be used"):
        FaultProxy(port=int(first.url.rpartition(":")[2])).__enter__()


@pytest.fixture
def orders(proxy):
    with control(proxy) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with httpx.Client(base_url=f"http://127.0.0.1:{server.server_address[1]}", trust_env=False) as client:
            yield client
        server.shutdown()
        thread.join()


def test_orders_over_http_are_followed_and_counts_given(proxy, orders):
    assert orders.put("/", json={"up": {"latency_ms": 40}}).status_code == 200
    with call(proxy) as caller:
        assert timed(caller, b"abc") >= 40
    assert orders.get("/").json() == {"connections": 1, "requests": 0, "sent_bytes": 3, "received_bytes": 3}
    orders.put("/", json={"stop": True})
    with pytest.raises(ConnectionRefusedError), call(proxy):
        pass
    orders.put("/", json={"resume": True})
    orders.put("/", json={})
    with call(proxy) as caller:
        assert timed(caller, b"abc") > 0


@pytest.mark.parametrize("body", ["[]", "{", '{"sideways": {}}', '{"both": {"lag": 1}}', '{"both": 3}'])
def test_orders_that_make_no_sense_are_refused_and_change_nothing(echo, proxy, orders, body):
    orders.put("/", json={"up": {"answer": "HTTP/1.1 500 no\r\nContent-Length: 0\r\n\r\n"}})
    refused = orders.put("/", content=body)
    assert (refused.status_code, list(refused.json())) == (422, ["error"])
    with call(proxy) as caller:
        caller.sendall(HEAD)
        assert read(caller, 12) == b"HTTP/1.1 500"
