"""Runs inside the child process: builds walls around it, then runs the program in it.

    python -I -S -B guard.py '{"cpu_s": 2, ...}'      # working directory: an empty one, program.py

The kernel's walls come first: limits, a network namespace without interfaces, Landlock rules that
leave only the working directory writable, and for root another user id. A Python audit hook stands
inside them. It is a fence, not a wall: it gives clear errors, and is all there is where the kernel
refuses the rest. Which of them stand is the first line of stderr; then the program starts.
Standard library only.
"""

import ctypes
import json
import os
import random
import resource
import runpy
import stat
import sys

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 8, 38
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture
PATH_BENEATH = 1
SCOPE_SIGNAL = 2
READ = 1 << 0 | 1 << 2 | 1 << 3  # execute, read file, read directory
CAP_DAC_READ_SEARCH = 2
LINUX_CAPABILITY_VERSION_3 = 0x20080522
ANYONE = 0o005

HOME = os.path.realpath(os.getcwd())
LIBRARIES = [os.path.realpath(path) for path in (sys.base_prefix, "/usr", "/lib", "/lib64")]
DEVICES = ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"]


class Ruleset(ctypes.Structure):
    """struct landlock_ruleset_attr; kernels take as much of it as their version knows."""

    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class Beneath(ctypes.Structure):
    """struct landlock_path_beneath_attr."""

    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def build_walls(limits):
    """Everything that the kernel grants; the names of what stands."""
    libc = ctypes.CDLL(None, use_errno=True)
    limit(resource.RLIMIT_CPU, limits["cpu_s"])
    limit(resource.RLIMIT_FSIZE, limits["file_bytes"])
    limit(resource.RLIMIT_NOFILE, limits["open_files"])
    limit(resource.RLIMIT_CORE, 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    is_root = os.geteuid() == 0
    new_network = CLONE_NEWNET if is_root else CLONE_NEWUSER | CLONE_NEWNET
    walls = []
    if libc.unshare(new_network) == 0:
        walls.append("network")
    # Another user can only read a library that lies open, or with the right to read anything,
    # which is safe only where Landlock takes it back.
    if confine_files(libc):
        walls.append("files")
    if is_root and ("files" in walls or all(map(lies_open, sys.path))):
        become_nobody(libc, reads_all="files" in walls)
    if os.geteuid() != 0:
        # Root is exempt from this limit.
        limit(resource.RLIMIT_NPROC, 1)
        drop_capabilities(libc, keep_reading=is_root and "files" in walls)
        walls.append("processes")
    limit(resource.RLIMIT_AS, limits["memory_bytes"])
    return walls


def limit(what, value):
    """Soft and hard."""
    resource.setrlimit(what, (value, value))


def confine_files(libc):
    """Landlock: libraries and a few devices can be read, only the working directory written."""
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    everything = (1 << (13 if version == 1 else 14 if version == 2 else 15)) - 1
    # From version 6 on: no signals to processes outside.
    ruleset = Ruleset(everything, 0, SCOPE_SIGNAL if version >= 6 else 0)
    size = ctypes.sizeof(ruleset) if version >= 6 else 8
    handle = libc.syscall(CREATE_RULESET, ctypes.byref(ruleset), size, 0)
    if handle < 0:
        return False
    writable = everything & ~(1 << 6 | 1 << 11)  # no character or block devices made
    allowed = [(HOME, writable), *((path, READ) for path in LIBRARIES)]
    allowed += [(path, 1 << 1 | 1 << 2) for path in DEVICES]
    for path, access in allowed:
        if os.path.exists(path):
            parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = Beneath(access, parent)
            libc.syscall(ADD_RULE, handle, PATH_BENEATH, ctypes.byref(rule), 0)
            os.close(parent)
    confined = libc.syscall(RESTRICT_SELF, handle, 0) == 0
    os.close(handle)
    return confined


def lies_open(path):
    """Whether every user can get there."""
    while os.path.exists(path) and path != "/":
        if stat.S_IMODE(os.stat(path).st_mode) & ANYONE != ANYONE:
            return False
        path = os.path.dirname(path)
    return True


def become_nobody(libc, reads_all):
    """A user id that no other process has, so that the limit on processes counts only ours."""
    user = random.SystemRandom().randrange(1 << 20, 1 << 30)
    os.chown(HOME, user, user)
    os.setgroups([])
    os.setresgid(user, user, user)
    libc.prctl(PR_SET_KEEPCAPS, int(reads_all), 0, 0, 0)
    os.setresuid(user, user, user)


def drop_capabilities(libc, keep_reading):
    """All of them, or all but reading what is not open to everyone."""
    kept = 1 << CAP_DAC_READ_SEARCH if keep_reading else 0
    header = (ctypes.c_uint32 * 2)(LINUX_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)
    libc.capset(header, data)


FORBIDDEN = (
    *("socket.", "subprocess.", "ctypes.", "gc.", "pty.", "mmap.", "syslog.", "ftplib."),
    *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.kill"),
    *("os.chown", "os.setxattr", "os.removexattr", "resource.setrlimit", "resource.prlimit"),
    *("sys._current", "sys.setprofile", "sys.settrace", "signal.pthread_kill", "os.putenv"),
    *("_posixsubprocess", "_thread.start_new_thread", "code.__new__", "cpython.run_interactive"),
)
CHANGES = (
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.utime", "os.chflags", "shutil."),
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def build_fence():
    """An audit hook: no sockets, processes or foreign functions, no files outside. It stays."""
    readable = (HOME, *LIBRARIES, *DEVICES, *map(os.path.realpath, sys.path))
    writable, forbidden, changes = (HOME, "/dev/null"), FORBIDDEN, CHANGES
    realpath, separator = os.path.realpath, os.sep
    decode = os.fsdecode

    def inside(path, places):
        if isinstance(path, int):
            return True
        path = realpath(decode(path))
        return any(path == place or path.startswith(place + separator) for place in places)

    def check(path, places):
        if path is not None and not inside(path, places):
            raise PermissionError(f"{path!r} is outside of the sandbox")

    def watch(event, values):
        if event.startswith(forbidden):
            raise PermissionError(f"{event} is not allowed in the sandbox")
        if event == "open":
            check(values[0], writable if (values[2] or 0) & WRITES else readable)
        elif event in ("os.listdir", "os.scandir", "os.walk", "glob.glob"):
            check(values[0], readable)
        elif event.startswith(changes):
            for path in values:
                check(path if isinstance(path, str | bytes) else None, writable)

    sys.addaudithook(watch)


def main():
    """Walls, fence, program."""
    limits = json.loads(sys.argv[1])
    walls = build_walls(limits)
    print(json.dumps(walls), file=sys.stderr, flush=True)
    sys.argv[:] = ["program.py"]
    for name in ("ctypes", "_ctypes", "resource"):
        sys.modules.pop(name, None)
    if limits["fence"]:
        build_fence()
    runpy.run_path("program.py", run_name="__main__")


if __name__ == "__main__":
    main()
