/* sp_exact.c - bin completion over groups of several degrees. */
#include "plan/sp_exact.h"

#include <math.h>
#include <string.h>

enum { MEMO_BITS = 13, MEMO = 1 << MEMO_BITS, NODES_PER_STEP = 8 };
/* Rounding: times and worths are sums of at most 64 terms.  Slack only ever admits more. */
#define SLACK 1e-11
#define WORTH_SLACK 1e-9

/* A set of items that is known not to fit on so many GPUs. */
typedef struct memo {
    uint64_t set;
    int64_t gpus;
} memo;

struct sp_exact {
    const sp_model *model;
    int64_t n;
    const double *s, *pi;
    double limit;                   /* time of a group, with slack                             */
    uint64_t same[SP_EXACT_ITEMS];  /* later items of the same length                          */
    double theta[SP_MAX_DEGREES];
    double *ratio;                  /* [D*(n+1)] best worth per share of items from i on       */
    memo *memo;                     /* [MEMO]                                                  */
    int64_t nodes;                  /* left                                                    */
    ovlm_meter *meter;
};

/* Where the search stands: what is left when the next group is opened, and that group. */
typedef struct place {
    uint64_t left;  /* items in no group yet                                                   */
    int64_t gpus;   /* free                                                                    */
    double worth;   /* of the items left                                                       */
    int64_t j;      /* the group's degree index                                                */
    double least;   /* a group worth less wastes too much                                      */
} place;

typedef struct content {
    uint64_t set;
    double sum_s, sum_s2, worth;
} content;

static sp_answer next_group(sp_exact *x, uint64_t left, int64_t gpus, double worth);

ovlm_status sp_exact_init(sp_exact **out, const sp_model *model, const double *s, int64_t n,
                          ovlm_arena *arena, ovlm_err *err)
{
    sp_exact *x = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &x, 1, err));
    *x = (sp_exact){.model = model, .n = n, .s = s};
    for (int64_t i = 0; i < n; i++) {
        for (int64_t o = i + 1; o < n && s[o] == s[i]; o++) {
            x->same[i] |= (uint64_t)1 << o;
        }
    }
    OVLM_TRY(OVLM_ARENA_NEW(arena, &x->ratio, model->D * (n + 1), err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &x->memo, MEMO, err));
    *out = x;
    return OVLM_OK;
}

static double time_of(const sp_exact *x, int64_t j, double sum_s, double sum_s2)
{
    return x->model->quad[j] * sum_s2 + x->model->lin[j] * sum_s;
}

static bool holds(const sp_exact *x, int64_t j, double sum_s, double sum_s2)
{
    return sum_s <= (double)x->model->cap[j] && time_of(x, j, sum_s, sum_s2) <= x->limit;
}

/* theta*time + (1 - theta)*memory as shares of the group: at most 1 for what it holds. */
static double share_of(const sp_exact *x, int64_t j, double sum_s, double sum_s2)
{
    double cap = (double)x->model->cap[j];
    double time = x->limit > 0 ? time_of(x, j, sum_s, sum_s2) / x->limit : 0;
    return x->theta[j] * time + (cap > 0 ? (1 - x->theta[j]) * sum_s / cap : 0);
}

static void set_ratios(sp_exact *x)
{
    int64_t n = x->n;
    for (int64_t j = 0; j < x->model->D; j++) {
        double *ratio = x->ratio + j * (n + 1);
        ratio[n] = 0;
        for (int64_t i = n - 1; i >= 0; i--) {
            double share = share_of(x, j, x->s[i], x->s[i] * x->s[i]);
            double own = share * 1e15 > x->pi[i] ? x->pi[i] / share : 1e15;
            ratio[i] = fmax(ratio[i + 1], own);
        }
    }
}

/* Another plan is as good when a smaller degree holds the set, when one more item fits, or when a
 * longer item fits in place of one of the set: exchanging them shortens the group it was in. */
static bool is_dominated(const sp_exact *x, const place *at, const content *c)
{
    for (int64_t j = 0; j < at->j; j++) {
        if (holds(x, j, c->sum_s, c->sum_s2)) {
            return true;
        }
    }
    uint64_t others = at->left & ~c->set;
    if (others == 0) {
        return false;
    }
    double shortest = x->s[63 - __builtin_clzll(others)];
    if (holds(x, at->j, c->sum_s + shortest, c->sum_s2 + shortest * shortest)) {
        return true;
    }
    for (uint64_t set = c->set; set != 0; set &= set - 1) {
        int64_t i = __builtin_ctzll(set);
        uint64_t longer = others & (((uint64_t)1 << i) - 1);
        while (longer != 0) {
            int64_t o = 63 - __builtin_clzll(longer);
            if (x->s[o] > x->s[i]) {
                double more = x->s[o] - x->s[i], more2 = x->s[o] * x->s[o] - x->s[i] * x->s[i];
                if (holds(x, at->j, c->sum_s + more, c->sum_s2 + more2)) {
                    return true;
                }
                break;
            }
            longer &= ~((uint64_t)1 << o);
        }
    }
    return false;
}

static bool is_over(sp_exact *x)
{
    x->nodes--;
    return x->nodes <= 0 ||
           (x->nodes % NODES_PER_STEP == 0 && ovlm_meter_spend(x->meter, 1));
}

/* All sets that add some of `rest` to the content, fullest first. */
static sp_answer complete(sp_exact *x, const place *at, content c, uint64_t rest)
{
    if (is_over(x)) {
        return SP_UNDECIDED;
    }
    const double *ratio = x->ratio + at->j * (x->n + 1);
    double room = 1 + SLACK - share_of(x, at->j, c.sum_s, c.sum_s2);
    while (rest != 0) {
        int64_t i = __builtin_ctzll(rest);
        if (c.worth + fmax(room, 0) * ratio[i] < at->least) {
            return SP_IMPOSSIBLE;
        }
        rest &= rest - 1;
        content with = {c.set | (uint64_t)1 << i, c.sum_s + x->s[i],
                        c.sum_s2 + x->s[i] * x->s[i], c.worth + x->pi[i]};
        if (holds(x, at->j, with.sum_s, with.sum_s2)) {
            sp_answer answer = complete(x, at, with, rest);
            if (answer != SP_IMPOSSIBLE) {
                return answer;
            }
        }
        rest &= ~x->same[i]; /* without this one, without its equals */
    }
    if (c.worth < at->least || is_dominated(x, at, &c)) {
        return SP_IMPOSSIBLE;
    }
    return next_group(x, at->left & ~c.set, at->gpus - x->model->degree[at->j],
                      at->worth - c.worth);
}

static memo *memo_of(const sp_exact *x, uint64_t set)
{
    return &x->memo[set * UINT64_C(0x9e3779b97f4a7c15) >> (64 - MEMO_BITS)];
}

static sp_answer next_group(sp_exact *x, uint64_t left, int64_t gpus, double worth)
{
    if (left == 0) {
        return SP_POSSIBLE;
    }
    double waste = (double)gpus - worth + WORTH_SLACK * (double)x->model->n_gpus;
    memo *known = memo_of(x, left);
    if (waste < 0 || (known->set == left && gpus <= known->gpus)) {
        return SP_IMPOSSIBLE;
    }
    int64_t head = __builtin_ctzll(left);
    double s = x->s[head];
    content alone = {(uint64_t)1 << head, s, s * s, x->pi[head]};
    for (int64_t j = 0; j < x->model->D && x->model->degree[j] <= gpus; j++) {
        if (!holds(x, j, s, s * s)) {
            continue;
        }
        place at = {left, gpus, worth, j, (double)x->model->degree[j] - waste};
        sp_answer answer = complete(x, &at, alone, left & (left - 1));
        if (answer != SP_IMPOSSIBLE) {
            return answer;
        }
    }
    *known = (memo){left, gpus};
    return SP_IMPOSSIBLE;
}

sp_answer sp_exact_decide(sp_exact *x, double makespan, const double *pi, const double *theta,
                          int64_t nodes, ovlm_meter *meter)
{
    double worth = 0;
    x->limit = makespan * (1 + SLACK);
    x->pi = pi;
    x->nodes = nodes;
    x->meter = meter;
    memset(x->memo, 0, MEMO * sizeof *x->memo);
    memcpy(x->theta, theta, (size_t)x->model->D * sizeof *theta);
    set_ratios(x);
    for (int64_t i = 0; i < x->n; i++) {
        worth += pi[i];
    }
    uint64_t all = x->n < 64 ? ((uint64_t)1 << x->n) - 1 : ~(uint64_t)0;
    return next_group(x, all, x->model->n_gpus, worth);
}
