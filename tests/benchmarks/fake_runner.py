"""A runner for the tests: keeps to the protocol and needs no package; what it does is told by its first argument."""

from __future__ import annotations

import sys
import time

from benchmarks.rivals.protocol import serve


def lingua():
    def answer(request):
        print("a library that prints to standard output")
        if request["op"] == "nll":
            return {"nll": 2.5}
        words = request["text"].split(" ")
        # Keeps more than it is asked to, as the real one does.
        return {"text": " ".join(words[: max(1, round(len(words) * min(1.0, 0.1 + request["rate"])))])}

    return answer


def kv():
    def answer(request):
        assert 0 < request["kept"] <= len(request["prefix"])
        found = [{"ids": q["gold"][:-1], "log_likelihood": -0.5 * len(q["gold"])} for q in request["questions"]]
        return {"answers": found, "kv_bytes": request["kept"]}

    return answer


def fails():
    raise OSError("no such model")


def refuses():
    def answer(request):
        raise ValueError("cannot compress this")

    return answer


def dies():
    def answer(request):
        print("out of memory", file=sys.stderr)
        raise SystemExit(3)

    return answer


def babbles():
    print("not an object")
    sys.stdout.flush()


def sleeps():
    time.sleep(60)


if __name__ == "__main__":
    chosen = {f.__name__: f for f in (lingua, kv, fails, refuses, dies, babbles, sleeps)}[sys.argv[1]]
    if chosen in (babbles, sleeps):
        chosen()
    else:
        serve(chosen, ("torch",))
