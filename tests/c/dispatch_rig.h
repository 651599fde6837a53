/* dispatch_rig.h - arrays whose rows say who they are: (rank, item, row), then a hash of that. */
#ifndef OVLM_DISPATCH_RIG_H
#define OVLM_DISPATCH_RIG_H

#include <stdlib.h>
#include <string.h>

#include "comm_rig.h"
#include "engine/dispatch.h"

enum { RIG_LOADS_MOST = 4, RIG_UNTOUCHED = 0xee };

/* A route under test. */
typedef struct rig_leg {
    const ovlm_route *route;
    const int64_t *place;   /* or NULL */
    int64_t source_rows[RIG_RANKS_MOST], destination_rows[RIG_RANKS_MOST]; /* room of the arrays */
} rig_leg;

static inline uint64_t rig_hash(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* Row `row` of an item that `rank` made, in load number t. */
static inline void rig_write_row(unsigned char *to, int64_t bytes, int64_t rank, int64_t item,
                                 int64_t row, int64_t t)
{
    int64_t name[3] = {rank, item, row}, done = 0;
    uint64_t state = rig_hash((uint64_t)rank * 1000003u + (uint64_t)item) ^
                     rig_hash((uint64_t)row * 31u + (uint64_t)t);
    if (bytes >= (int64_t)sizeof name) {
        memcpy(to, name, sizeof name);
        done = (int64_t)sizeof name;
    }
    for (; done < bytes; done += (int64_t)sizeof state) {
        state = rig_hash(state);
        int64_t left = bytes - done;
        memcpy(to + done, &state, left < (int64_t)sizeof state ? (size_t)left : sizeof state);
    }
}

static inline int64_t rig_end(const rig_leg *leg, int64_t p)
{
    return (leg->place != NULL ? leg->place[p] : leg->route->receive_row[p]) +
           leg->route->n_rows[p];
}

/* A leg with arrays as long as its pieces reach, and a few rows more where rows may be left out. */
static inline rig_leg rig_leg_of(const ovlm_route *route, const int64_t *place, int64_t spare)
{
    rig_leg leg = {.route = route, .place = place};
    for (int64_t p = 0; p < route->k; p++) {
        int64_t *source = &leg.source_rows[route->source[p]];
        int64_t *destination = &leg.destination_rows[route->destination[p]];
        int64_t leaves = route->send_row[p] + route->n_rows[p], arrives = rig_end(&leg, p);
        *source = leaves > *source ? leaves : *source;
        *destination = arrives > *destination ? arrives : *destination;
    }
    for (int64_t r = 0; r < route->n_ranks; r++) {
        leg.source_rows[r] += spare;
        leg.destination_rows[r] += spare;
    }
    return leg;
}

/* What a rank holds before (`after` = false), or is to hold after: written from the definition. */
static inline unsigned char *rig_array(const rig_leg *leg, int64_t rank, bool after, int64_t bytes,
                                       int64_t t)
{
    const ovlm_route *route = leg->route;
    int64_t rows = after ? leg->destination_rows[rank] : leg->source_rows[rank];
    unsigned char *array = rig_bytes(rows * bytes);
    for (int64_t p = 0; p < route->k; p++) {
        if ((after ? route->destination[p] : route->source[p]) != rank) {
            continue;
        }
        int64_t first = after ? rig_end(leg, p) - route->n_rows[p] : route->send_row[p];
        for (int64_t r = 0; r < route->n_rows[p]; r++) {
            rig_write_row(array + (first + r) * bytes, bytes, route->source[p], route->item[p],
                          route->first_row[p] + r, t);
        }
    }
    return array;
}

/* A prepared transfer of up to RIG_LOADS_MOST loads; `from` is written by the caller. */
typedef struct rig_transfer {
    const rig_leg *leg;
    ovlm_dispatch *dispatch;
    ovlm_parcel parcel;
    ovlm_load load[RIG_LOADS_MOST];
    int64_t from_rows, to_rows;
    ovlm_trip trip;
} rig_transfer;

static inline void rig_open(rig_rank *self, rig_transfer *x, const rig_leg *leg, int64_t n,
                            const int64_t *row_bytes, ovlm_pool *pool)
{
    ovlm_dispatch_spec spec = {leg->route, self->rank, leg->place, leg->source_rows[self->rank],
                               leg->destination_rows[self->rank]};
    *x = (rig_transfer){.leg = leg};
    RTRY(self, ovlm_dispatch_prepare(&spec, &x->dispatch, &self->err));
    x->parcel = (ovlm_parcel){.n = n, .load = x->load, .pool = pool};
    for (int64_t t = 0; t < n; t++) {
        x->load[t] = (ovlm_load){.row_bytes = row_bytes[t], .dtype = OVLM_U8};
    }
    RTRY(self, ovlm_dispatch_measure(x->dispatch, &x->parcel, &x->parcel.scratch_bytes,
                                     &self->err));
    int64_t rounded = (x->parcel.scratch_bytes + 63) / 64 * 64;
    x->parcel.scratch = aligned_alloc(64, (size_t)(rounded > 0 ? rounded : 64));
}

/* Fresh arrays: what the rank holds on the side that rows leave from, untouched on the other. */
static inline void rig_fill(rig_rank *self, rig_transfer *x, bool back)
{
    int64_t before = x->leg->source_rows[self->rank], after = x->leg->destination_rows[self->rank];
    x->from_rows = back ? after : before;
    x->to_rows = back ? before : after;
    for (int64_t t = 0; t < x->parcel.n; t++) {
        x->load[t].from = rig_array(x->leg, self->rank, back, x->load[t].row_bytes, t);
        x->load[t].to = rig_bytes(x->to_rows * x->load[t].row_bytes);
    }
}

static inline void rig_empty(rig_transfer *x)
{
    for (int64_t t = 0; t < x->parcel.n; t++) {
        free((void *)(uintptr_t)x->load[t].from);
        free(x->load[t].to);
        x->load[t].from = x->load[t].to = NULL;
    }
}

static inline void rig_close(rig_transfer *x)
{
    rig_empty(x);
    free(x->parcel.scratch);
    ovlm_dispatch_free(x->dispatch);
}

/* What arrived, byte for byte. */
static inline void rig_compare(rig_rank *self, const rig_transfer *x, bool back, const char *what)
{
    for (int64_t t = 0; t < x->parcel.n; t++) {
        int64_t bytes = x->load[t].row_bytes;
        unsigned char *want = rig_array(x->leg, self->rank, !back, bytes, t);
        const unsigned char *got = x->load[t].to;
        int64_t i = 0, n = x->to_rows * bytes;
        while (i < n && got[i] == want[i]) {
            i++;
        }
        RCHECK(self, i == n, "%s: load %lld differs at row %lld, byte %lld of %lld", what,
               (long long)t, (long long)(i / bytes), (long long)(i % bytes), (long long)bytes);
        free(want);
    }
}

#endif
