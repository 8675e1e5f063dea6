// combine.cuh, with records and flags: apart, so that both compile at once.
#include "combine.cuh"

namespace epops {

#ifdef EPOPS_TRACE
int read_combine_trace(uint64_t* out) { return cudaMemcpyFromSymbol(out, trace_clock, sizeof(trace_clock)); }
#endif

int launch_combine(const CombineParams& p, void* stream) { return launch_any<false>(p, stream); }

}  // namespace epops
