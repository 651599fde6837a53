/* step_relabel.c - which rank takes which mini-batch, phase after phase.
 *
 * The language phase is named first, the encoders standing where balancing put them; then every
 * encoder, with the language phase fixed.  Each problem counts the exposed bytes (encoder outputs),
 * and the raw data, which travels ahead of time, only decides between equals.  Only mini-batches of
 * the same shape change places: whole ranks of a balanced phase; groups of one degree within their
 * micro-batch (by the sum of bytes, for both objectives). */
#include <string.h>

#include "plan/relabel.h"
#include "plan/route.h"
#include "plan/step.h"

typedef struct flow_list {
    int64_t n;
    int64_t *label, *rank, *bytes;
} flow_list;

static ovlm_status flows_init(flow_list *flows, int64_t room, ovlm_arena *arena, ovlm_err *err)
{
    *flows = (flow_list){0};
    OVLM_TRY(OVLM_ARENA_RAW(arena, &flows->label, room, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &flows->rank, room, err));
    return OVLM_ARENA_RAW(arena, &flows->bytes, room, err);
}

static void add_flow(flow_list *flows, int64_t label, int64_t rank, int64_t bytes)
{
    if (bytes > 0) {
        flows->label[flows->n] = label;
        flows->rank[flows->n] = rank;
        flows->bytes[flows->n++] = bytes;
    }
}

static ovlm_status rename_share(const step_input *input, const flow_list *exposed,
                                const flow_list *hidden, const ovlm_budget *budget,
                                ovlm_step_share *share, ovlm_relabel_result *result,
                                ovlm_arena *arena, ovlm_err *err)
{
    int64_t n_ranks = input->problem->n_ranks, *rank_of = NULL;
    double *loads = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &rank_of, n_ranks, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &loads, n_ranks, err));
    ovlm_relabel_problem problem = {
        .n = exposed->n, .n_ranks = n_ranks, .node_size = input->problem->gpus_per_node,
        .label = exposed->label, .rank = exposed->rank, .bytes = exposed->bytes,
        .n_ties = hidden->n, .tie_label = hidden->label, .tie_rank = hidden->rank,
        .tie_bytes = hidden->bytes, .mode = input->problem->relabel};
    OVLM_TRY(ovlm_relabel_solve(&problem, budget, rank_of, result, err));
    for (int64_t i = 0; i < share->n; i++) {
        share->rank[i] = rank_of[share->rank[i]];
    }
    memcpy(loads, share->loads, (size_t)n_ranks * sizeof *loads);
    for (int64_t j = 0; j < n_ranks; j++) {
        share->loads[rank_of[j]] = loads[j];
    }
    return OVLM_OK;
}

/* Where outputs of item k of phase p come from, on their way to the language phase. */
static int64_t sender(const step_input *input, const ovlm_step_plan *plan, int64_t p, int64_t k)
{
    return input->problem->compose ? plan->share[p].rank[k] : input->home[p][k];
}

static ovlm_status rename_llm(const step_input *input, const ovlm_budget *budget,
                              ovlm_step_plan *plan, ovlm_arena *arena, ovlm_err *err)
{
    const ovlm_step_problem *problem = input->problem;
    ovlm_step_share *share = &plan->share[plan->n_phases];
    flow_list exposed, hidden;
    OVLM_TRY(flows_init(&exposed, input->n_items, arena, err));
    OVLM_TRY(flows_init(&hidden, problem->n, arena, err));
    for (int64_t p = 0; p < plan->n_phases; p++) {
        const int64_t *sample = problem->phase[p].sample;
        for (int64_t k = 0; k < problem->phase[p].n; k++) {
            add_flow(&exposed, share->rank[sample[k]], sender(input, plan, p, k),
                     input->out_bytes[p][k]);
        }
    }
    for (int64_t i = 0; i < problem->n; i++) {
        add_flow(&hidden, share->rank[i], problem->source_rank[i], input->text_bytes[i]);
    }
    return rename_share(input, &exposed, &hidden, budget, share, &plan->relabel[plan->n_phases],
                        arena, err);
}

static ovlm_status rename_encoder(const step_input *input, const step_cells *cells,
                                  const step_pieces *pieces, int64_t p, const ovlm_budget *budget,
                                  ovlm_step_plan *plan, ovlm_arena *arena, ovlm_err *err)
{
    const ovlm_step_items *items = &input->problem->phase[p];
    ovlm_step_share *share = &plan->share[p];
    flow_list exposed, hidden;
    OVLM_TRY(flows_init(&exposed, input->problem->compose ? pieces->k : items->n, arena, err));
    OVLM_TRY(flows_init(&hidden, items->n, arena, err));
    for (int64_t c = 0; c < cells->n_cells && input->problem->compose; c++) {
        for (int64_t k = pieces->cell_start[c]; k < pieces->cell_start[c + 1]; k++) {
            const step_piece *x = &pieces->piece[k];
            add_flow(&exposed, share->rank[x->item], cells->rank[c],
                     step_bytes(x->n_rows, items->out_bytes_per_token));
        }
    }
    for (int64_t k = 0; k < items->n; k++) {
        if (!input->problem->compose) {
            add_flow(&exposed, share->rank[k], input->home[p][k], input->out_bytes[p][k]);
        }
        add_flow(&hidden, share->rank[k], input->home[p][k], items->bytes[k]);
    }
    return rename_share(input, &exposed, &hidden, budget, share, &plan->relabel[p], arena, err);
}

/* Groups of one degree in one micro-batch, and the places they may swap. */
typedef struct block_set {
    int64_t n, degree;
    int64_t *group; /* [n] */
    int64_t *class; /* [n] of its place: the node where blocks lie in one, else the place itself */
    int64_t *room, n_classes;
} block_set;

static void classify(block_set *set, const ovlm_sp_plan *plan, int64_t node_size,
                     int64_t *class_of_node)
{
    set->n_classes = 0;
    for (int64_t b = 0; b < set->n; b++) {
        int64_t first = plan->first_gpu[set->group[b]], node = first / node_size;
        bool inside = node == (first + set->degree - 1) / node_size;
        int64_t class = inside ? class_of_node[node] : -1;
        if (class < 0) {
            class = set->n_classes++;
            set->room[class] = 0;
        }
        if (inside) {
            class_of_node[node] = class;
        }
        set->room[class]++;
        set->class[b] = class;
    }
    for (int64_t b = 0; b < set->n; b++) {
        class_of_node[plan->first_gpu[set->group[b]] / node_size] = -1;
    }
}

/* The groups of the least degree above set->degree in groups first .. end-1; false: there is none.
 * */
static bool next_degree(block_set *set, const ovlm_sp_plan *plan, int64_t first, int64_t end)
{
    int64_t least = INT64_MAX;
    for (int64_t g = first; g < end; g++) {
        int64_t degree = plan->degree[g];
        least = degree > set->degree && degree < least ? degree : least;
    }
    set->degree = least;
    set->n = 0;
    for (int64_t g = first; g < end; g++) {
        if (plan->degree[g] == least) {
            set->group[set->n++] = g;
        }
    }
    return set->n > 0;
}

typedef struct sequence_flows {
    int64_t n, *start; /* [groups + 1] flows by group                                           */
    int64_t *order;    /* into the rest                                                         */
    int64_t *group, *shard, *rank, *bytes;
} sequence_flows;

/* Bytes that stay inside a node when the set's b-th group takes the place of its other-th. */
static double kept(const sequence_flows *flows, const ovlm_sp_plan *plan, const block_set *set,
                   int64_t b, int64_t other, int64_t node_size)
{
    int64_t g = set->group[b], first = plan->first_gpu[set->group[other]];
    double sum = 0;
    for (int64_t e = flows->start[g]; e < flows->start[g + 1]; e++) {
        int64_t f = flows->order[e];
        bool same = (first + flows->shard[f]) / node_size == flows->rank[f] / node_size;
        sum += same ? (double)flows->bytes[f] : 0;
    }
    return sum;
}

/* Best places for the groups of one set; only whole classes are told apart. */
static ovlm_status swap_blocks(const sequence_flows *flows, block_set *set, ovlm_sp_plan *plan,
                               int64_t node_size, ovlm_meter *meter, ovlm_arena *arena,
                               ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    double *gain = NULL, most = 0, now = 0, then = 0;
    int64_t *class_of = NULL, *speaker = NULL, *place = NULL, *cursor = NULL;
    int64_t n = set->n, K = set->n_classes;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &gain, n * K, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &class_of, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &speaker, K, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &place, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &cursor, K + 1, err));
    for (int64_t b = n - 1; b >= 0; b--) {
        speaker[set->class[b]] = b;
    }
    for (int64_t b = 0; b < n; b++) {
        for (int64_t k = 0; k < K; k++) {
            gain[b * K + k] = kept(flows, plan, set, b, speaker[k], node_size);
        }
        now += gain[b * K + set->class[b]];
    }
    OVLM_TRY(relabel_transport(gain, n, K, set->room, meter, class_of, &most, arena, err));
    for (int64_t k = 0; k < K; k++) {
        cursor[k + 1] = cursor[k] + set->room[k];
    }
    for (int64_t b = 0; b < n; b++) {
        place[cursor[set->class[b]]++] = plan->first_gpu[set->group[b]];
        then += gain[b * K + class_of[b]];
    }
    for (int64_t b = 0; b < n && then > now; b++) {
        plan->first_gpu[set->group[b]] = place[--cursor[class_of[b]]];
    }
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}

/* Outputs of phase p in cell c, which is a shard of group g. */
static void add_cell(const step_input *input, const ovlm_step_plan *plan,
                     const step_pieces *pieces, int64_t p, int64_t g, int64_t c, int64_t shard,
                     sequence_flows *flows)
{
    for (int64_t k = pieces->cell_start[c]; k < pieces->cell_start[c + 1]; k++) {
        const step_piece *x = &pieces->piece[k];
        int64_t f = flows->n++;
        flows->group[f] = g;
        flows->shard[f] = shard;
        flows->rank[f] = sender(input, plan, p, x->item);
        flows->bytes[f] = (int64_t)((double)x->n_rows *
                                    input->problem->phase[p].out_bytes_per_token);
    }
}

static ovlm_status gather_flows(const step_input *input, const ovlm_step_plan *plan,
                                const step_cells *cells, const step_pieces *pieces,
                                sequence_flows *flows, ovlm_arena *arena, ovlm_err *err)
{
    int64_t room = 0;
    for (int64_t p = 0; p < plan->n_phases; p++) {
        room += pieces[1 + p].k;
    }
    OVLM_TRY(OVLM_ARENA_NEW(arena, &flows->start, cells->n_groups + 1, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &flows->order, room, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &flows->group, room, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &flows->shard, room, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &flows->rank, room, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &flows->bytes, room, err));
    for (int64_t p = 0; p < plan->n_phases; p++) {
        for (int64_t g = 0; g < cells->n_groups; g++) {
            for (int64_t c = cells->cell_start[g]; c < cells->cell_start[g + 1]; c++) {
                add_cell(input, plan, &pieces[1 + p], p, g, c, c - cells->cell_start[g], flows);
            }
        }
    }
    route_group(flows->group, cells->n_groups, NULL, flows->n, flows->order, flows->start);
    return OVLM_OK;
}

static ovlm_status rename_groups(const step_input *input, const step_cells *cells,
                                 const step_pieces *pieces, const ovlm_budget *budget,
                                 ovlm_step_plan *plan, ovlm_arena *arena, ovlm_err *err)
{
    enum { WORK_STRIDE = 100 };
    static const int64_t default_work = 1000000;
    ovlm_sp_plan *sequences = plan->sequences;
    int64_t node_size = input->problem->gpus_per_node, *class_of_node = NULL;
    int64_t nodes = (input->problem->n_ranks - 1) / node_size + 1;
    sequence_flows flows = {0};
    block_set set = {0};
    ovlm_meter meter;
    ovlm_meter_start(&meter, budget, default_work, WORK_STRIDE);
    OVLM_TRY(gather_flows(input, plan, cells, pieces, &flows, arena, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &set.group, sequences->n_groups, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &set.class, sequences->n_groups, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &set.room, sequences->n_groups, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &class_of_node, nodes, err));
    memset(class_of_node, -1, (size_t)nodes * sizeof *class_of_node);
    for (int64_t m = 0; m < sequences->n_micro; m++) {
        int64_t first = sequences->micro_start[m], end = sequences->micro_start[m + 1];
        set.degree = 0;
        while (next_degree(&set, sequences, first, end)) {
            if (set.n > 1) {
                classify(&set, sequences, node_size, class_of_node);
                OVLM_TRY(swap_blocks(&flows, &set, sequences, node_size, &meter, arena, err));
            }
        }
    }
    plan->cut_short = plan->cut_short || meter.cut_short;
    return meter.interrupted ? OVLM_FAIL(err, OVLM_E_INTERRUPTED, "relabelling was interrupted")
                             : OVLM_OK;
}

ovlm_status step_relabel(const step_input *input, step_cells *cells, const step_pieces *pieces,
                         const ovlm_meter *clock, const ovlm_budget *budget, ovlm_step_plan *plan,
                         ovlm_arena *arena, ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    ovlm_budget part = step_budget(clock, budget, plan->n_phases + 1);
    if (input->problem->sequence_parallel) {
        OVLM_TRY(rename_groups(input, cells, pieces, &part, plan, arena, err));
    } else {
        OVLM_TRY(rename_llm(input, &part, plan, arena, err));
    }
    step_cells_place(cells, input, plan);
    ovlm_arena_rewind(arena, mark);
    for (int64_t p = 0; p < plan->n_phases; p++) {
        part = step_budget(clock, budget, plan->n_phases - p);
        OVLM_TRY(rename_encoder(input, cells, &pieces[1 + p], p, &part, plan, arena, err));
        ovlm_arena_rewind(arena, mark);
    }
    for (int64_t p = 0; p <= plan->n_phases; p++) {
        plan->cut_short = plan->cut_short || plan->relabel[p].cut_short;
    }
    return OVLM_OK;
}
