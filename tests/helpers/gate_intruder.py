"""Another user's program at the port of `--serve-actors`: python -m tests.helpers.gate_intruder PORT RECORDED

RECORDED is what an actor has once sent in its handshake, in hexadecimal. It holds what connections it can, in silence
or a byte at a time, and meanwhile sends nonsense, half handshakes and the recorded one, and asks as Reverb's client.
Prints what it has got, other than greetings; then `busy` lines until it is ended.
"""

import contextlib
import os
import socket
import sys
import time

import reverb

NOBODY = 65534
GREETING_BYTES = 51  # of a gate


def connect(port):
    connected = socket.create_connection(('localhost', port), timeout=10)
    connected.settimeout(10)
    return connected


def answer(port, sent):
    """What the gate says to that, after its greeting."""
    received = b''
    with contextlib.suppress(OSError), connect(port) as connected:
        connected.sendall(sent)
        connected.shutdown(socket.SHUT_WR)
        while data := connected.recv(1000):
            received += data
    return received[GREETING_BYTES:].strip(b'\0')  # Zeros: the secret was wrong.


def main(port, recorded):
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    nonsense = [
        b'',
        b'x',
        b'GET / HTTP/1.1\r\n\r\n',
        b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n',
        os.urandom(10_000),
        bytes(83),
    ]
    half = [recorded[:1], recorded[:GREETING_BYTES], recorded[:-1], recorded[:GREETING_BYTES] + bytes(32)]
    for sent in [*nonsense, *half, recorded, recorded + b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n']:
        if got := answer(port, sent):
            print('got', got, flush=True)
    try:
        print('got', reverb.Client(f'localhost:{port}').server_info(timeout=3), flush=True)
    except Exception as error:
        print('Reverb:', type(error).__name__, flush=True)
    while True:
        held = []
        for _ in range(300):
            with contextlib.suppress(OSError):
                held.append(connect(port))
        print('busy', flush=True)
        for byte in recorded[:6]:
            time.sleep(0.5)
            for connected in held[::2]:
                with contextlib.suppress(OSError):
                    connected.send(bytes([byte]))
        for connected in held:
            connected.close()


if __name__ == '__main__':
    main(int(sys.argv[1]), bytes.fromhex(sys.argv[2]))
