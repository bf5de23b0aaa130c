"""Kernels for the tests of notebooks, forked from one process that has imported all that takes seconds to import.

Without arguments this is that process, asked over the socket it finds as its standard input. With arguments it is what jupyter starts
in a kernel's place: `SOCKET CONNECTION_FILE ...` asks for a kernel, passes signals on to it, and ends when it does."""
import importlib, json, os, pkgutil, runpy, signal, socket, sys


def serve():
    "Import, then fork a kernel for each who asks, until whoever started this is gone. Only a process without threads can be forked: none is started here."
    import ipykernel.kernelapp, spklip
    for module in pkgutil.walk_packages(spklip.__path__, "spklip."): importlib.import_module(module.name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN) # nobody waits for the kernels here
    listener, parent = socket.socket(fileno=os.dup(0)), os.getppid()
    listener.settimeout(2)
    while os.getppid() == parent:
        try: asking, _ = listener.accept()
        except TimeoutError: continue
        if os.fork() == 0: return be_kernel(asking)
        asking.close()


def be_kernel(asking):
    "In the forked process: a kernel, with the folder and arguments it is asked for. Its end closes `asking`."
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.setsid()
    folder, *arguments = json.loads(asking.recv(100_000))
    os.chdir(folder)
    asking.sendall(str(os.getpid()).encode())
    sys.argv = ["ipykernel_launcher", "-f", *arguments, f"--IPKernelApp.parent_handle={os.getppid()}"] # it ends with that process
    runpy.run_module("ipykernel_launcher", run_name="__main__")


def ask(path, *arguments):
    server = socket.socket(socket.AF_UNIX); server.connect(path)
    server.sendall(json.dumps([os.getcwd(), *arguments]).encode())
    kernel = int(server.recv(32))
    for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, lambda number, _: os.kill(kernel, number))
    while server.recv(32): pass


if __name__ == "__main__": ask(*sys.argv[1:]) if sys.argv[1:] else serve()
