"""Kills a process before each of its operations on files in turn."""

import itertools
import os
import sys

_OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "shutil.rmtree", "ctypes.dlsym"}


def killed_everywhere(prepare, action):
    """Run `action` again and again, each time killed one operation later; yields what `prepare` returned.

    Args:
        prepare: called before each run, with its number; its result is given to `action`.
        action: what a process of its own does.

    Yields:
        The result of `prepare`, and whether the process got to the end, which it does the last time.
    """
    for number in itertools.count(1):
        prepared = prepare(number)
        child = os.fork()
        if not child:
            _die_at(number)
            try:
                action(prepared)
            finally:
                os._exit(0 if sys.exc_info()[0] is None else 1)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, 9), code
        yield prepared, code == 0
        if code == 0:
            assert number > 3
            return


def _die_at(number):
    count = itertools.count(1)

    def hook(event, arguments):
        writes = event != "open" or (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if event in _OPERATIONS and writes and next(count) == number:
            os._exit(9)  # as SIGKILL would: nothing is cleaned up

    sys.addaudithook(hook)
