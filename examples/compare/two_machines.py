"""Runs a command as two ranks on two "machines" that a slow and lossy network joins, without a second machine.

usage: two_machines.py [--delay-ms 5] [--jitter-ms 1] [--loss 0.01] [--mbit 100] [--cut SECONDS] [--measure] COMMAND ...

for example

    python3 two_machines.py --loss 0.01 cl train lora.toml --out runs/two --set train.gradient_accumulation_steps=2

A machine here is a network namespace of Linux with nothing in it but a loopback and a TUN device, 10.77.0.1 or 10.77.0.2.
This script reads the IP packets that one device sends, drops each with probability --loss (seeded by --seed), and gives the
others to the other device, at most --mbit Mbit/s in each direction (0: no bound), after --delay-ms plus a random time of up
to --jitter-ms. Packets of one direction stay in their order; those that wait for the rate are not dropped.
COMMAND runs once in each namespace, with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, GLOO_SOCKET_IFNAME and one thread
(OMP_NUM_THREADS); files and processors are shared. Lines that a rank prints begin with its number.

--cut drops everything from so many seconds after the start: what each machine sees when a cable is pulled.
--measure first sends 2,000 numbered UDP packets in each direction, and prints their delay and loss; without a COMMAND, this
is all that is done.

Prints the seconds after which each rank ended, with its exit status, and how many packets passed and were dropped. Ends
with 0 if both ranks did. Needs Linux, root, /dev/net/tun and `ip`, no emulation of networks in the kernel (netem). The
namespaces have no names, so they are gone with the last process in them, however this script ends. On Ctrl-C and SIGTERM
the ranks get SIGTERM, and SIGKILL if they still run after half a minute.
"""
import argparse
import collections
import contextlib
import ctypes
import fcntl
import os
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

DEVICE = "slow0"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
CLONE_NEWNET, TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x40000000, 0x400454CA, 0x0001, 0x1000
libc = ctypes.CDLL(None, use_errno=True)


def checked(result):
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Machine:
    """A network namespace with a TUN device."""

    def __init__(self, address):
        self.address = address
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            checked(libc.unshare(CLONE_NEWNET))
            self.namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
            # Offers of TUNSETOFFLOAD are not made, so what comes is packets of at most 1,500 bytes with their checksums.
            self.tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(self.tun, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
            for words in (f"address add {address}/24 dev {DEVICE}", "link set lo up",
                          f"link set {DEVICE} up txqueuelen 10000"):
                subprocess.run(["ip", *words.split()], check=True)
        finally:
            checked(libc.setns(before, CLONE_NEWNET))
            os.close(before)

    @contextlib.contextmanager
    def inside(self):
        """What this thread opens or starts meanwhile belongs to the namespace."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        checked(libc.setns(self.namespace, CLONE_NEWNET))
        try:
            yield
        finally:
            checked(libc.setns(before, CLONE_NEWNET))
            os.close(before)


class Link(threading.Thread):
    """Passes packets between two machines."""

    def __init__(self, machines, delay, jitter, loss, seed, mbit):
        super().__init__(daemon=True)
        self.tuns = [machine.tun for machine in machines]
        self.delay, self.jitter, self.loss = delay, jitter, loss
        self.seconds_per_byte = 8e-6 / mbit if mbit else 0
        self.free_at = [0, 0]  # by source: when the line has sent what is waiting
        self.random = random.Random(seed)
        self.cut_at = float("inf")
        self.reset()

    def reset(self):
        """Begins to count again, by the machine that sent a packet."""
        self.passed, self.dropped, self.bytes, self.cut = [0, 0], [0, 0], [0, 0], [0, 0]

    def run(self):
        waiting = [collections.deque(), collections.deque()]  # by source: (when it is due, packet)
        while True:
            due = min((queue[0][0] for queue in waiting if queue), default=float("inf"))
            timeout = min(max(due - time.monotonic(), 0), 1)
            ready = select.select(self.tuns, [], [], timeout)[0]
            for source, tun in enumerate(self.tuns):
                if tun in ready:
                    self.take(source, waiting[source])
                self.give(source, waiting[source])

    def take(self, source, queue):
        for _ in range(64):
            try:
                packet = os.read(self.tuns[source], 65536)
            except BlockingIOError:
                return
            now = time.monotonic()
            if packet[0] >> 4 != 4:  # IPv6's search for neighbours
                continue
            if now >= self.cut_at:
                self.cut[source] += 1
            elif self.random.random() < self.loss:
                self.dropped[source] += 1
            else:
                self.free_at[source] = max(now, self.free_at[source]) + len(packet) * self.seconds_per_byte
                due = self.free_at[source] + self.delay + self.random.random() * self.jitter
                queue.append((max(due, queue[-1][0]) if queue else due, packet))

    def give(self, source, queue):
        now = time.monotonic()
        while queue and queue[0][0] <= now:
            packet = queue.popleft()[1]
            if now >= self.cut_at:
                self.cut[source] += 1
                continue
            os.write(self.tuns[1 - source], packet)
            self.passed[source] += 1
            self.bytes[source] += len(packet)


def measure(source, target, count=2000, pause=0.001):
    """Mean delay in ms and lost fraction of UDP packets from one machine to the other."""
    with target.inside():
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with source.inside():
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind((target.address, 0))
    delays = []

    def receive(until):
        while select.select([receiver], [], [], max(until - time.monotonic(), 0))[0]:
            sent, = struct.unpack("d", receiver.recv(64))
            delays.append(time.monotonic() - sent)

    with sender, receiver:
        for _ in range(count):
            sender.sendto(struct.pack("d", time.monotonic()), receiver.getsockname())
            receive(time.monotonic() + pause)
        receive(time.monotonic() + 1)
    return 1e3 * sum(delays) / max(len(delays), 1), 1 - len(delays) / count


def start(rank, machine, command, port):
    """Starts a rank, and a thread that prints its lines."""
    variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": ADDRESSES[0],
                 "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": 1}
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    with machine.inside():
        process = subprocess.Popen(command, env=environment, text=True, errors="replace", stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)

    def echo():
        for line in process.stdout:
            print(f"[{rank}] {line}", end="", flush=True)

    thread = threading.Thread(target=echo, daemon=True)
    thread.start()
    return process, thread


def wait(processes, started, link):
    """Waits for both ranks, and says when each ended."""
    running = dict(enumerate(processes))
    while running:
        for rank, process in list(running.items()):
            if process.poll() is not None:
                now = time.monotonic()
                after = f", {now - link.cut_at:.1f} s after the cut" if now > link.cut_at else ""
                print(f"rank {rank} ended with {process.returncode} after {now - started:.1f} s{after}", flush=True)
                del running[rank]
        time.sleep(0.05)


def stop(processes):
    """Ends what still runs, without being interrupted in it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for signal_number, seconds in ((signal.SIGTERM, 30), (signal.SIGKILL, None)):
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal_number)
        deadline = time.monotonic() + (seconds or 0)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0) if seconds else None)


def main():
    parser = argparse.ArgumentParser(usage=__doc__.split("usage: ")[1].split("\n")[0])
    parser.add_argument("--delay-ms", type=float, default=5, help="one-way delay of a packet (5)")
    parser.add_argument("--jitter-ms", type=float, default=1, help="random time of at most this in addition (1)")
    parser.add_argument("--loss", type=float, default=0.01, help="probability that a packet is dropped (0.01)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (0)")
    parser.add_argument("--mbit", type=float, default=100, help="Mbit/s in each direction, 0 for no bound (100)")
    parser.add_argument("--cut", type=float, metavar="SECONDS", help="drop everything from then on")
    parser.add_argument("--port", type=int, default=29400, help="where the ranks meet (29400)")
    parser.add_argument("--measure", action="store_true", help="send UDP packets first, and print their delay and loss")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND")
    args = parser.parse_args()
    if not args.command and not args.measure:
        parser.error("a COMMAND or --measure is needed")
    if args.command and not shutil.which(args.command[0]):
        parser.error(f"no program {args.command[0]}")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    machines = [Machine(address) for address in ADDRESSES]
    link = Link(machines, args.delay_ms / 1e3, args.jitter_ms / 1e3, args.loss, args.seed, args.mbit)
    link.start()
    if args.measure:
        for source in (0, 1):
            delay, lost = measure(machines[source], machines[1 - source])
            print(f"UDP, machine {source} to machine {1 - source}: {delay:.2f} ms, {lost:.2%} lost", flush=True)
    if not args.command:
        return 0
    link.reset()
    ranks, started = [], time.monotonic()
    try:
        for rank, machine in enumerate(machines):
            ranks.append(start(rank, machine, args.command, args.port))
        if args.cut is not None:
            link.cut_at = started + args.cut
        wait([process for process, _ in ranks], started, link)
    finally:
        stop([process for process, _ in ranks])
        for _, thread in ranks:
            thread.join(1)
        for source in (0, 1):
            cut = f", {link.cut[source]:,} by the cut" if args.cut is not None else ""
            print(f"machine {source} to machine {1 - source}: {link.passed[source]:,} packets passed "
                  f"({link.bytes[source] / 1e6:.1f} MB), {link.dropped[source]:,} dropped at random{cut}")
    return 0 if all(process.returncode == 0 for process, _ in ranks) else 1


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
