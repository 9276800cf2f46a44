"""Two processes that a test can compute in, with a gloo process group between them."""

import multiprocessing
import os
import tempfile
import traceback

import torch

SECONDS = 240  # after which ranks that wait for each other are given up


def serve(rank, world, folder, pipe):
    import torch.distributed as dist

    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    while (call := pipe.recv()) is not None:
        function, args = call
        try:
            pipe.send((function(rank, *args), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """``run(function, *args)`` gives [function(rank, *args) for each rank], each in its process."""

    def __init__(self, world=2):
        self.world, self.processes = world, []

    def run(self, function, *args):
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = []
        for pipe in self.pipes:
            if not pipe.poll(SECONDS):
                self.stop()
                raise TimeoutError(f"{function.__name__}: ranks wait for each other")
            answers.append(pipe.recv())
        if errors := [error for _, error in answers if error]:
            self.stop()  # they may be at different places
            raise AssertionError("\n".join(errors))
        return [answer for answer, _ in answers]

    def start(self):
        context = multiprocessing.get_context("spawn")
        folder = tempfile.mkdtemp()
        pairs = [context.Pipe() for _ in range(self.world)]
        self.pipes = [ours for ours, _ in pairs]
        self.processes = [
            context.Process(target=serve, args=(rank, self.world, folder, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        for process in self.processes:
            process.start()

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []
