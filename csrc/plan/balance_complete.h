/* balance_complete.h - a pool of units distributed exactly over a few ranks.
 *
 * Rank after rank takes a subset of the pool whose sum lies in [lo, hi]: hi is the rank's room, lo
 * what the later ranks cannot hold.  Where the ranks are nearly full that window is narrow and the
 * search tiny. */
#ifndef OVLM_PLAN_BALANCE_COMPLETE_H
#define OVLM_PLAN_BALANCE_COMPLETE_H

#include "plan/balance_parts.h"

enum { BAL_POOL = 24, BAL_BINS = 7 };

typedef struct bal_bin {
    int64_t rank;
    double add;           /* additive cost of the units that stay                              */
    int64_t count, size;  /* of the units that stay                                            */
    double room;          /* additive cost that the pool may bring                             */
} bal_bin;

typedef struct bal_pool {
    const bal_model *model;
    bal_bin bin[BAL_BINS];
    int n_bins, n_pool;
    int64_t unit[BAL_POOL]; /* descending by cost                                              */
    double a[BAL_POOL];
    int to[BAL_POOL];       /* bin of each, the answer                                         */
    int banned;             /* pool position that bin 0 must not take; -1: none                */
    int64_t nodes;          /* search steps left                                               */
} bal_pool;

/* Distributes the pool within all rooms and limits; false when that is impossible or the steps are
 * used up.  Bins that are empty and alike are filled in order of their largest unit. */
bool bal_complete(bal_pool *pool);

#endif
