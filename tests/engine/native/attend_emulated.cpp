// attend.cu as a function of a shared library.
#include "attend.cu"

static const Params* given;

static void attend_once() { attend(*given); }

extern "C" void run_attend(
    const Params* params, int x, int y, int z, int threads, int cluster, long shared_bytes,
    unsigned seed) {
    given = params;
    emulated::run(attend_once, {x, y, z}, threads, cluster, shared_bytes, seed);
}
