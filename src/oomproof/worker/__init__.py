"""A model in a process of its own: a parent without CUDA, pipes, and a supervisor between them.

launch.py     what to start: plan, folder, limits of time
engine.py     the parent's side: an engine.protocol.Engine whose model is elsewhere
process.py    a child process: pipes, its last words, its end
course.py     what the workers run by now; failures.py, endings.py: why one does not serve
frames.py     length-prefixed frames; wire.py, wire_errors.py: messages as JSON
child.py      the child's side: takes requests, runs steps, tells events
loading.py    the child's way from a plan to an engine
"""
