/* op_counter.h - the fast CPU backend, noting which operations ran without a plan: a call is
 * prepared when `prepare` saw the same operation with the same extents before. */
#ifndef OVLM_OP_COUNTER_H
#define OVLM_OP_COUNTER_H

#include "backend/backend.h"

/* Forgets what was prepared, and counts from 0. */
const ovlm_ops *op_counter_ops(void);

typedef struct op_count {
    int64_t run, unprepared;
    const char *first;  /* the first operation that was not prepared, or NULL */
} op_count;

op_count op_counter_read(void);

#endif
