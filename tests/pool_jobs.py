"""Jobs for a pool of processes, which import this file: it imports nothing that takes time."""

import os
import time


def worker(greeting):
    def do(job):
        if job["what"] == "raise":
            raise ValueError("no luck\nat all")
        if job["what"] == "die":
            os._exit(3)
        if job["what"] == "hang":
            time.sleep(600)
        return {"said": f"{greeting} {job['what']}", "process": os.getpid()}

    return do
