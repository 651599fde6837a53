/* balance_difference.c - Karmarkar and Karp's differencing method over N sets.
 *
 * A partial solution is a tuple of N sets, kept as a linked list of its non-empty sets by sum,
 * largest first; the missing ones are empty.  The two tuples of largest spread (first sum less
 * last) are combined, largest set with smallest, until one is left.  Every set in any list is an
 * entry that started as one unit, so lists need no memory but the n entries.  With equal counts,
 * tuples start as N consecutive units of the sorted list.  (Karmarkar, Karp 1982; Michiels et al.
 * 2003.) */
#include "plan/balance_parts.h"

typedef struct entry {
    double sum;
    int64_t first, last; /* the set as a list of units through `link`                          */
    int64_t next;        /* next entry of the tuple, -1 ends                                   */
} entry;

typedef struct tuple {
    double spread;
    int64_t head, n, number; /* first entry, how many, age for ties                            */
} tuple;

typedef struct differ {
    int64_t n_ranks;
    entry *entry;    /* [n_units]                                                              */
    int64_t *link;   /* [n_units] next unit of the same set, -1 ends                           */
    int64_t *stack;  /* [n_ranks] entries of the tuple that is turned around                   */
    tuple *heap;     /* [n] by spread, then by age                                             */
    int64_t n;
} differ;

static bool before(const tuple *a, const tuple *b)
{
    return a->spread > b->spread || (a->spread >= b->spread && a->number < b->number);
}

static void heap_push(differ *d, tuple t)
{
    int64_t i = d->n++;
    while (i > 0 && before(&t, &d->heap[(i - 1) / 2])) {
        d->heap[i] = d->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    d->heap[i] = t;
}

static tuple heap_pop(differ *d)
{
    tuple top = d->heap[0], t = d->heap[--d->n];
    int64_t i = 0;
    for (;;) {
        int64_t child = 2 * i + 1;
        if (child >= d->n) {
            break;
        }
        child += child + 1 < d->n && before(&d->heap[child + 1], &d->heap[child]) ? 1 : 0;
        if (!before(&d->heap[child], &t)) {
            break;
        }
        d->heap[i] = d->heap[child];
        i = child;
    }
    d->heap[i] = t;
    return top;
}

/* Merges two lists that descend by sum; `a` first on ties. */
static int64_t merge_lists(entry *e, int64_t a, int64_t b)
{
    int64_t head = -1, *tail = &head;
    while (a >= 0 && b >= 0) {
        int64_t *take = e[a].sum >= e[b].sum ? &a : &b;
        *tail = *take;
        tail = &e[*take].next;
        *take = *tail;
    }
    *tail = a >= 0 ? a : b;
    return head;
}

/* Sorts a list of n entries by sum, descending (merge sort). */
static int64_t sort_list(entry *e, int64_t head, int64_t n)
{
    if (n <= 1) {
        return head;
    }
    int64_t cut = head;
    for (int64_t i = 1; i < n / 2; i++) {
        cut = e[cut].next;
    }
    int64_t rest = e[cut].next;
    e[cut].next = -1;
    int64_t left = sort_list(e, head, n / 2);
    return merge_lists(e, left, sort_list(e, rest, n - n / 2));
}

static double spread_of(const differ *d, int64_t head, int64_t n)
{
    int64_t last = head;
    while (d->entry[last].next >= 0) {
        last = d->entry[last].next;
    }
    return d->entry[head].sum - (n == d->n_ranks ? d->entry[last].sum : 0);
}

/* Combines b into a: position i of a with position N - 1 - i of b. */
static tuple combine(differ *d, tuple a, tuple b, int64_t number)
{
    entry *e = d->entry;
    int64_t n_overlap = a.n + b.n - d->n_ranks, depth = 0;
    n_overlap = n_overlap > 0 ? n_overlap : 0;
    for (int64_t i = b.head; i >= 0; i = e[i].next) {
        d->stack[depth++] = i;
    }
    /* the first a.n - n_overlap sets of a meet empty ones of b, and the other way round */
    int64_t *cut = &a.head;
    for (int64_t i = 0; i < a.n - n_overlap; i++) {
        cut = &e[*cut].next;
    }
    int64_t mixed = *cut;
    *cut = -1;
    for (int64_t i = mixed; i >= 0; i = e[i].next) {
        const entry *small = &e[d->stack[--depth]];
        e[i].sum += small->sum;
        d->link[e[i].last] = small->first;
        e[i].last = small->last;
    }
    int64_t rest = -1;
    if (depth > 0) {
        rest = b.head;
        e[d->stack[depth - 1]].next = -1;
    }
    mixed = sort_list(e, mixed, n_overlap);
    int64_t head = merge_lists(e, merge_lists(e, a.head, rest), mixed);
    int64_t n = a.n + b.n - n_overlap;
    return (tuple){spread_of(d, head, n), head, n, number};
}

static ovlm_status differ_init(differ *d, const bal_model *model, bool equal, ovlm_arena *arena,
                               ovlm_err *err)
{
    int64_t n = model->n_units, N = model->n_ranks, width = equal ? N : 1;
    *d = (differ){.n_ranks = N};
    OVLM_TRY(OVLM_ARENA_NEW(arena, &d->entry, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &d->link, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &d->stack, N, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &d->heap, n, err));
    for (int64_t i = 0; i < n; i++) {
        int64_t u = model->order[i];
        d->link[u] = -1;
        d->entry[i] = (entry){model->a[u], u, u, (i + 1) % width == 0 ? -1 : i + 1};
    }
    for (int64_t i = 0; i + width <= n; i += width) {
        heap_push(d, (tuple){spread_of(d, i, width), i, width, i});
    }
    return OVLM_OK;
}

/* Empty ranks take a unit each from ranks of several: no load rises. */
static void fill_empty(const bal_model *model, bal_plan *plan, int64_t *n_on)
{
    int64_t empty = 0;
    for (int64_t i = model->n_units - 1; i >= 0; i--) {
        int64_t u = model->order[i];
        while (empty < model->n_ranks && n_on[empty] > 0) {
            empty++;
        }
        if (empty == model->n_ranks) {
            return;
        }
        if (n_on[plan->rank[u]] > 1) {
            n_on[plan->rank[u]]--;
            n_on[empty]++;
            plan->rank[u] = empty;
        }
    }
}

ovlm_status bal_difference(bal_search *search, bal_plan *plan, bool *done, ovlm_err *err)
{
    const bal_model *model = search->model;
    ovlm_arena *arena = search->arena;
    int64_t n = model->n_units, N = model->n_ranks;
    bool equal = n > 0 && n % N == 0 && model->min_items == n / N && model->max_items == n / N;
    bool free = model->min_items <= 1 && model->max_items >= n;
    *done = false;
    if (!model->uniform || model->padded || model->count != NULL || n == 0 || !(equal || free)) {
        return OVLM_OK;
    }
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    differ d;
    int64_t *n_on = NULL;
    OVLM_TRY(differ_init(&d, model, equal && !free, arena, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &n_on, N, err));
    for (int64_t number = n; d.n > 1; number++) {
        tuple a = heap_pop(&d), b = heap_pop(&d);
        heap_push(&d, combine(&d, a, b, number));
        if (ovlm_meter_spend(search->meter, (a.n + b.n) / 8 + 1)) {
            ovlm_arena_rewind(arena, mark);
            return OVLM_OK;
        }
    }
    int64_t r = 0;
    for (int64_t i = d.heap[0].head; i >= 0; i = d.entry[i].next, r++) {
        for (int64_t u = d.entry[i].first; u >= 0; u = d.link[u]) {
            plan->rank[u] = r;
            n_on[r]++;
        }
    }
    if (model->min_items == 1) {
        fill_empty(model, plan, n_on);
    }
    *done = bal_plan_settle(model, plan);
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}
