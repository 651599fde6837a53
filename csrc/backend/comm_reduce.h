/* comm_reduce.h - sums in a fixed order: what reductions do with the parts that they hold. */
#ifndef OVLM_BACKEND_COMM_REDUCE_H
#define OVLM_BACKEND_COMM_REDUCE_H

#include "backend/comm.h"

/* out[i] = part[0][i] + part[1][i] + ... in this order (or max, min); out may be one of the
 * parts. */
void ovlm_comm_reduce_parts(void *out, const void *const *part, int64_t parts, int64_t n,
                            ovlm_dtype dtype, ovlm_reduce reduce);

#endif
