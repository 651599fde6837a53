/* dispatch_trip.c - a transfer from end to end: scratch, counts, the all-to-all, what is left. */
#include "engine/dispatch_state.h"

static const int64_t MAX_BYTES = (int64_t)1 << 62;

enum { ALIGN = 64 };

int64_t dispatch_width(const ovlm_parcel *parcel)
{
    int64_t width = 0;
    for (int64_t t = 0; t < parcel->n; t++) {
        width += parcel->load[t].row_bytes;
    }
    return width;
}

/* ------------------------------------------------------------------ scratch -------------- */

/* The next `bytes` of the block that begins at base. */
static void *take(char *base, int64_t *used, int64_t bytes)
{
    char *at = base == NULL ? NULL : base + *used;
    *used += (bytes + ALIGN - 1) / ALIGN * ALIGN;
    return at;
}

static bool is_wire(const dispatch_runs *runs, const ovlm_parcel *parcel)
{
    return runs->direct && parcel->n == 1;
}

int64_t dispatch_lay_out(const ovlm_dispatch *d, const ovlm_parcel *parcel, char *base,
                         dispatch_scratch *scratch)
{
    int64_t used = 0, width = dispatch_width(parcel);
    int64_t counts = d->n_ranks * (int64_t)sizeof(int64_t);
    int64_t threads = parcel->pool != NULL ? ovlm_pool_threads(parcel->pool) : 1;
    scratch->send_bytes = take(base, &used, counts);
    scratch->send_at = take(base, &used, counts);
    scratch->recv_bytes = take(base, &used, counts);
    scratch->recv_at = take(base, &used, counts);
    scratch->out = scratch->in = NULL;
    /* what is added must stand on the wire first */
    if (!is_wire(&d->out, parcel) || !d->tiled) {
        scratch->out = take(base, &used, d->rows.sent * width);
    }
    if (!is_wire(&d->in, parcel)) {
        scratch->in = take(base, &used, d->rows.received * width);
    }
    int64_t parts = threads * d->sums.most * (int64_t)sizeof *scratch->parts;
    scratch->parts = take(base, &used, parts);
    return used;
}

/* Sums need whole elements, where the processor can read them. */
static ovlm_status check_sums(const ovlm_parcel *parcel, int64_t t, int64_t before, int64_t width,
                              ovlm_err *err)
{
    const ovlm_load *load = &parcel->load[t];
    if (load->dtype != OVLM_F32 && load->dtype != OVLM_F64 && load->dtype != OVLM_BF16) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "load %lld: rows that went to several places are summed, which needs "
                         "float32, float64 or bfloat16; got %s",
                         (long long)t, ovlm_dtype_name(load->dtype));
    }
    int64_t bytes = ovlm_dtype_bytes(load->dtype);
    if (load->row_bytes % bytes != 0) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "load %lld: row_bytes is %lld, which is no whole number of %s",
                         (long long)t, (long long)load->row_bytes, ovlm_dtype_name(load->dtype));
    }
    if (before % bytes != 0 || width % bytes != 0) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "load %lld: %s is not aligned beside rows of the other loads; send it by "
                         "itself, or with loads whose row_bytes are multiples of %lld",
                         (long long)t, ovlm_dtype_name(load->dtype), (long long)bytes);
    }
    return OVLM_OK;
}

static ovlm_status check_loads(const ovlm_dispatch *d, const ovlm_parcel *parcel, bool back,
                               ovlm_err *err)
{
    int64_t width = 0, rows = d->rows.source;
    const int64_t others[] = {d->rows.destination, d->rows.sent, d->rows.received};
    for (int i = 0; i < 3; i++) {
        rows = others[i] > rows ? others[i] : rows;
    }
    for (int64_t t = 0; t < parcel->n; t++) {
        int64_t bytes = parcel->load[t].row_bytes;
        if (bytes < 0 || bytes > (MAX_BYTES - width) / (rows + 1)) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "load %lld: row_bytes is %lld for up to %lld rows; all loads together "
                             "must be below 2^62 bytes",
                             (long long)t, (long long)bytes, (long long)rows);
        }
        width += bytes;
    }
    if (width > MAX_BYTES / (rows + 1)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "%lld loads with rows of %lld bytes: above 2^62 bytes",
                         (long long)parcel->n, (long long)width);
    }
    int64_t before = 0;
    for (int64_t t = 0; back && d->rows.sums && t < parcel->n; t++) {
        OVLM_TRY(check_sums(parcel, t, before, width, err));
        before += parcel->load[t].row_bytes;
    }
    return OVLM_OK;
}

ovlm_status ovlm_dispatch_measure(const ovlm_dispatch *dispatch, const ovlm_parcel *parcel,
                                  int64_t *scratch_bytes, ovlm_err *err)
{
    dispatch_scratch scratch;
    OVLM_TRY(check_loads(dispatch, parcel, false, err));
    *scratch_bytes = dispatch_lay_out(dispatch, parcel, NULL, &scratch);
    return OVLM_OK;
}

/* ------------------------------------------------------------------ the exchange --------- */

static ovlm_status check_memory(const ovlm_dispatch *d, const ovlm_parcel *parcel, bool back,
                                ovlm_err *err)
{
    int64_t from_rows = back ? d->rows.destination : d->rows.source;
    int64_t to_rows = back ? d->rows.source : d->rows.destination;
    for (int64_t t = 0; t < parcel->n; t++) {
        const ovlm_load *load = &parcel->load[t];
        if (load->row_bytes > 0 && ((load->from == NULL && from_rows > 0) ||
                                    (load->to == NULL && to_rows > 0))) {
            return OVLM_FAIL(err, OVLM_E_ARG, "load %lld: %s is NULL, and has %lld rows",
                             (long long)t, load->from == NULL ? "from" : "to",
                             (long long)(load->from == NULL ? from_rows : to_rows));
        }
    }
    dispatch_scratch scratch;
    int64_t needed = dispatch_lay_out(d, parcel, NULL, &scratch);
    if (parcel->scratch == NULL || parcel->scratch_bytes < needed ||
        (uintptr_t)parcel->scratch % ALIGN != 0) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "scratch has %lld bytes; the transfer takes %lld, aligned to %d",
                         (long long)(parcel->scratch != NULL ? parcel->scratch_bytes : 0),
                         (long long)needed, (int)ALIGN);
    }
    return OVLM_OK;
}

/* Bytes per rank at one end of the all-to-all, and where they begin in the wire or the array. */
static void fill_counts(const dispatch_runs *runs, int64_t n_ranks, int64_t width, bool array,
                        int64_t *bytes, int64_t *at)
{
    for (int64_t r = 0; r < n_ranks; r++) {
        bytes[r] = (runs->peer_wire[r + 1] - runs->peer_wire[r]) * width;
        at[r] = (array ? runs->peer_row[r] : runs->peer_wire[r]) * width;
    }
}

/* What a transfer moves at one end: there, rows of `out` leave and rows of `in` arrive; back, the
 * other way round. */
static dispatch_move move_of(const ovlm_trip *trip, const dispatch_scratch *scratch, bool out)
{
    const ovlm_dispatch *d = trip->dispatch;
    return (dispatch_move){.dispatch = d, .parcel = &trip->parcel, .runs = out ? &d->out : &d->in,
                           .wire = out ? scratch->out : scratch->in,
                           .width = dispatch_width(&trip->parcel), .back = trip->back,
                           .parts = scratch->parts};
}

/* Whether rows arrive where they belong, or leave from where they are. */
static bool in_place(const ovlm_trip *trip, bool out)
{
    const ovlm_dispatch *d = trip->dispatch;
    bool adds = out && trip->back && !d->tiled;
    return is_wire(out ? &d->out : &d->in, &trip->parcel) && !adds;
}

static ovlm_all_to_all exchange_of(const ovlm_trip *trip, const dispatch_scratch *scratch)
{
    const ovlm_dispatch *d = trip->dispatch;
    bool leave = !trip->back, from_array = in_place(trip, leave), to_array = in_place(trip, !leave);
    dispatch_move out = move_of(trip, scratch, leave), in = move_of(trip, scratch, !leave);
    fill_counts(out.runs, d->n_ranks, out.width, from_array, scratch->send_bytes,
                scratch->send_at);
    fill_counts(in.runs, d->n_ranks, in.width, to_array, scratch->recv_bytes, scratch->recv_at);
    return (ovlm_all_to_all){
        .send = from_array ? trip->parcel.load[0].from : out.wire,
        .send_bytes = scratch->send_bytes, .send_at = scratch->send_at,
        .recv = to_array ? trip->parcel.load[0].to : in.wire,
        .recv_bytes = scratch->recv_bytes, .recv_at = scratch->recv_at};
}

/* What stays; the way back with sums adds it with the rest. */
static void keep(const ovlm_trip *trip, const dispatch_scratch *scratch)
{
    if (!trip->back || trip->dispatch->tiled) {
        dispatch_move move = move_of(trip, scratch, true);
        dispatch_keep(&move);
    }
}

static void unpack(const ovlm_trip *trip, const dispatch_scratch *scratch)
{
    dispatch_move move = move_of(trip, scratch, trip->back);
    if (trip->back && !trip->dispatch->tiled) {
        dispatch_add(&move);
    } else if (!in_place(trip, trip->back)) {
        dispatch_unpack(&move);
    }
}

/* Checks, packs and hands over: to a start, or for `waits` to a call that ends with the rows. */
static ovlm_status set_out(const ovlm_dispatch *d, const ovlm_parcel *parcel, ovlm_comm *comm,
                           bool back, bool waits, ovlm_trip *trip, ovlm_err *err)
{
    *trip = (ovlm_trip){.dispatch = d, .comm = comm, .parcel = *parcel, .back = back};
    if (ovlm_comm_size(comm) != d->n_ranks || ovlm_comm_rank(comm) != d->rank) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "comm is rank %lld of %lld; the dispatcher was prepared for rank %lld of "
                         "%lld",
                         (long long)ovlm_comm_rank(comm), (long long)ovlm_comm_size(comm),
                         (long long)d->rank, (long long)d->n_ranks);
    }
    OVLM_TRY(check_loads(d, parcel, back, err));
    OVLM_TRY(check_memory(d, parcel, back, err));
    dispatch_scratch scratch;
    (void)dispatch_lay_out(d, parcel, parcel->scratch, &scratch);
    if (!in_place(trip, !back)) {
        dispatch_move move = move_of(trip, &scratch, !back);
        dispatch_pack(&move);
    }
    ovlm_all_to_all exchange = exchange_of(trip, &scratch);
    OVLM_TRY(waits ? ovlm_comm_all_to_all(comm, &exchange, err)
                   : ovlm_comm_all_to_all_start(comm, &exchange, &trip->ticket, err));
    keep(trip, &scratch);
    if (waits) {
        unpack(trip, &scratch);
    }
    return OVLM_OK;
}

ovlm_status ovlm_dispatch_apply(const ovlm_dispatch *dispatch, const ovlm_parcel *parcel,
                                ovlm_comm *comm, ovlm_err *err)
{
    ovlm_trip trip;
    return set_out(dispatch, parcel, comm, false, true, &trip, err);
}

ovlm_status ovlm_dispatch_reverse(const ovlm_dispatch *dispatch, const ovlm_parcel *parcel,
                                  ovlm_comm *comm, ovlm_err *err)
{
    ovlm_trip trip;
    return set_out(dispatch, parcel, comm, true, true, &trip, err);
}

ovlm_status ovlm_dispatch_start(const ovlm_dispatch *dispatch, const ovlm_parcel *parcel,
                                ovlm_comm *comm, ovlm_trip *trip, ovlm_err *err)
{
    return set_out(dispatch, parcel, comm, false, false, trip, err);
}

ovlm_status ovlm_dispatch_start_reverse(const ovlm_dispatch *dispatch, const ovlm_parcel *parcel,
                                        ovlm_comm *comm, ovlm_trip *trip, ovlm_err *err)
{
    return set_out(dispatch, parcel, comm, true, false, trip, err);
}

ovlm_status ovlm_dispatch_wait(ovlm_trip *trip, ovlm_err *err)
{
    OVLM_TRY(ovlm_comm_wait(trip->comm, trip->ticket, err));
    dispatch_scratch scratch;
    (void)dispatch_lay_out(trip->dispatch, &trip->parcel, trip->parcel.scratch, &scratch);
    unpack(trip, &scratch);
    return OVLM_OK;
}
