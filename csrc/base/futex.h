/* futex.h - sleeping until a word of memory changes; the word may be shared between processes. */
#ifndef OVLM_BASE_FUTEX_H
#define OVLM_BASE_FUTEX_H

#include <stdatomic.h>

/* Returns when the word is no longer `seen`, after `seconds`, or for no reason at all (a signal):
 * callers look again. */
void ovlm_futex_wait(const atomic_uint *word, unsigned seen, double seconds);
/* Wakes all that wait for this word; call it after the change. */
void ovlm_futex_wake(atomic_uint *word);

#endif
