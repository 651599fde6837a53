/* test_ops_async.c - the backend that behaves like a device: every operation gives what its inner
 * backend gives, late; order comes from events alone; misuse is found. */
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>

#include "cpu/async.h"
#include "cpu/check.h"
#include "cpu/cpu_device.h"
#include "cpu/ref.h"
#include "op_cases.h"
#include "test.h"

static ovlm_backend *device;
static ovlm_queue *queue;
static ovlm_err err;

#define OK(call) CHECK((call) == OVLM_OK, "%s", err.message)

/* ---- operations ---- */

/* To the bit, with another number of threads. */
static void test_same_as_inner(const ovlm_ops *inner, int rounds, int64_t size)
{
    ovlm_backend_options options = {.threads = 1}, more = {.threads = 2};
    ovlm_backend *plain, *late;
    ovlm_queue *plain_queue, *late_queue;
    OK(inner->open(&options, &plain, &err));
    OK(inner->queue_open(plain, &plain_queue, &err));
    OK(ovlm_async_open(inner, &more, &late, &err));
    OK(late->ops->queue_open(late, &late_queue, &err));
    for (int i = 0; i < rounds * OVLM_OP_COUNT; i++) {
        op_case c;
        op_result here, there;
        char text[64];
        op_case_draw(&c, (ovlm_op)(i % OVLM_OP_COUNT), i % 2 ? OVLM_BF16 : OVLM_F32, size,
                     &test_rng);
        ovlm_rng strides = test_rng; /* the order of a sum may depend on them */
        OK(op_case_run(&c, plain_queue, false, true, &strides, &here, &err));
        OK(op_case_run(&c, late_queue, false, true, &test_rng, &there, &err));
        const char *where = op_result_difference(&c, &here, &there, text);
        CHECK(where == NULL, "%s: %s differs", ovlm_op_schemas[c.op]->name, where);
        op_result_free(&here);
        op_result_free(&there);
        op_case_free(&c);
    }
    late->ops->queue_close(late_queue);
    late->ops->close(late);
    inner->queue_close(plain_queue);
    inner->close(plain);
}

/* The comparing backend on top of it, which reads device memory by copies alone. */
static ovlm_status open_async_ref(const ovlm_backend_options *options, ovlm_backend **backend,
                                  ovlm_err *error)
{
    return ovlm_async_open(&ovlm_ref_ops, options, backend, error);
}

static void test_checked(int rounds)
{
    ovlm_ops table = ovlm_async_ops;
    table.open = open_async_ref;
    ovlm_backend_options options = {.threads = 1};
    ovlm_backend *backend;
    ovlm_queue *checked;
    OK(ovlm_check_open(&table, &options, &backend, &err));
    CHECK(!backend->host_memory, "the tested backend's memory is the device's");
    OK(backend->ops->queue_open(backend, &checked, &err));
    for (int i = 0; i < rounds * OVLM_OP_COUNT; i++) {
        op_case c;
        op_result result;
        op_case_draw(&c, (ovlm_op)(i % OVLM_OP_COUNT), OVLM_F32, 7, &test_rng);
        OK(op_case_run(&c, checked, false, true, &test_rng, &result, &err));
        op_result_free(&result);
        op_case_free(&c);
    }
    backend->ops->queue_close(checked);
    backend->ops->close(backend);
}

/* ---- what a device does ---- */

typedef struct small {
    float *x, *y; /* device, 4 elements */
    ovlm_scale args;
} small;

static small small_new(void)
{
    small s = {0};
    void *x, *y;
    OK(device->ops->alloc(device, 16, &x, &err));
    OK(device->ops->alloc(device, 16, &y, &err));
    s.x = x;
    s.y = y;
    s.args = (ovlm_scale){.alpha = 2};
    s.args.x = ovlm_tensor_of(x, 1, 4, OVLM_F32);
    s.args.y = ovlm_tensor_of(y, 1, 4, OVLM_F32);
    return s;
}

static void small_free(const small *s)
{
    device->ops->free(device, s->x);
    device->ops->free(device, s->y);
}

static ovlm_status scale(ovlm_queue *q, const small *s)
{
    return device->ops->scale.fwd(q, &s->args, &err);
}

static ovlm_status copy(ovlm_queue *q, void *to, const void *from, ovlm_copy_kind kind)
{
    return device->ops->copy(q, to, from, 16, kind, &err);
}

static void test_late(void)
{
    small s = small_new();
    float in[4] = {1, 2, 3, 4}, out[4] = {0};
    ovlm_event *event;
    OK(device->ops->event_open(device, &event, &err));
    CHECK(device->ops->event_done(event), "an event that was never recorded is done");
    ovlm_async_hold(queue, true);
    OK(copy(queue, s.x, in, OVLM_TO_DEVICE));
    in[0] = 10; /* the copy has not been made yet: a device would see this too */
    OK(scale(queue, &s));
    s.args.alpha = 99; /* arguments were copied */
    OK(copy(queue, out, s.y, OVLM_TO_HOST));
    OK(device->ops->event_record(event, queue, &err));
    CHECK(!device->ops->event_done(event) && out[0] == 0, "too early");
    OK(device->ops->queue_wait(queue, &err));
    CHECK(out[0] == 20 && out[3] == 8, "got %g and %g", (double)out[0], (double)out[3]);
    CHECK(device->ops->event_done(event), "not done after a wait");
    device->ops->event_close(device, event);
    small_free(&s);
}

/* Without a hold it is late too: nothing happens until somebody waits. */
static void test_lazy(void)
{
    small s = small_new();
    float in[4] = {1, 2, 3, 4}, out[4] = {0};
    ovlm_event *event;
    OK(device->ops->event_open(device, &event, &err));
    OK(copy(queue, s.x, in, OVLM_TO_DEVICE));
    OK(scale(queue, &s));
    OK(copy(queue, out, s.y, OVLM_TO_HOST));
    OK(device->ops->event_record(event, queue, &err));
    CHECK(out[0] == 0, "it ran although nobody waits");
    while (!device->ops->event_done(event)) { /* polling is waiting */
    }
    CHECK(out[0] == 2, "got %g", (double)out[0]);
    OK(device->ops->queue_wait(queue, &err));
    device->ops->event_close(device, event);
    small_free(&s);
}

static void test_events_order_queues(void)
{
    small s = small_new();
    float in[4] = {1, 2, 3, 4}, out[4] = {0};
    ovlm_queue *other;
    ovlm_event *event, *back;
    OK(device->ops->queue_open(device, &other, &err));
    OK(device->ops->event_open(device, &event, &err));
    OK(device->ops->event_open(device, &back, &err));
    for (int i = 0; i < 40; i++) { /* there and back, each queue with half of the work */
        in[0] = (float)i;
        OK(copy(queue, s.x, in, OVLM_TO_DEVICE));
        OK(device->ops->event_record(event, queue, &err));
        OK(device->ops->queue_follow(other, event, &err));
        OK(scale(other, &s));
        OK(device->ops->event_record(back, other, &err));
        OK(device->ops->queue_follow(queue, back, &err));
        OK(copy(queue, out, s.y, OVLM_TO_HOST));
        OK(device->ops->queue_wait(queue, &err));
        CHECK(out[0] == (float)(2 * i), "round %d: %g", i, (double)out[0]);
    }
    /* Without an event nothing orders them. */
    ovlm_async_hold(queue, true);
    in[0] = 7;
    OK(copy(queue, s.x, in, OVLM_TO_DEVICE));
    OK(scale(other, &s));
    OK(device->ops->queue_wait(other, &err));
    OK(copy(other, out, s.y, OVLM_TO_HOST));
    OK(device->ops->queue_wait(other, &err));
    CHECK(out[0] == 78, "read what the other queue has not written: %g", (double)out[0]);
    OK(device->ops->queue_wait(queue, &err));
    /* An event that is recorded again does not move those who follow its old point, and may be
     * closed while they wait. */
    OK(device->ops->event_record(event, queue, &err));
    OK(device->ops->queue_follow(other, event, &err));
    OK(device->ops->event_record(event, other, &err));
    device->ops->event_close(device, event);
    device->ops->event_close(device, back);
    device->ops->queue_close(other);
    small_free(&s);
}

/* Both queues work at the same time on memory of their own. */
static void *busy(void *argument)
{
    ovlm_queue *mine = argument;
    ovlm_rng rng;
    ovlm_rng_init(&rng, 5);
    for (int i = 0; i < 2 * OVLM_OP_COUNT; i++) {
        op_case c;
        op_result result;
        op_case_draw(&c, (ovlm_op)(i % OVLM_OP_COUNT), OVLM_F32, 6, &rng);
        ovlm_err error;
        if (op_case_run(&c, mine, false, true, &rng, &result, &error) != OVLM_OK) {
            return mine;
        }
        op_result_free(&result);
        op_case_free(&c);
    }
    return NULL;
}

static void test_two_threads(void)
{
    ovlm_queue *other;
    pthread_t thread;
    void *failed = NULL;
    OK(device->ops->queue_open(device, &other, &err));
    CHECK(pthread_create(&thread, NULL, busy, other) == 0, "thread");
    CHECK(busy(queue) == NULL, "failed beside another thread");
    pthread_join(thread, &failed);
    CHECK(failed == NULL, "failed in another thread");
    device->ops->queue_close(other);
}

/* ---- misuse ---- */

static void expect_late(const char *text)
{
    err = (ovlm_err){0};
    ovlm_status status = device->ops->queue_wait(queue, &err);
    CHECK(status == OVLM_E_BACKEND && strstr(err.message, text) != NULL, "expected \"%s\": %d %s",
          text, (int)status, err.message);
    OK(device->ops->queue_wait(queue, &err)); /* reported once */
}

static void test_misuse(void)
{
    small s = small_new();
    float host[16] = {0}, out[4] = {5, 5, 5, 5};
    small wrong = s;
    wrong.args.x.data = host;
    OK(scale(queue, &wrong));
    OK(copy(queue, out, s.y, OVLM_TO_HOST)); /* skipped: the queue has failed */
    expect_late("scale forward: x, 16 bytes at");
    CHECK(out[0] == 5, "work after a failure");
    wrong = s;
    wrong.args.x.cols = wrong.args.y.cols = 5;
    wrong.args.x.stride = wrong.args.y.stride = 5;
    OK(scale(queue, &wrong));
    expect_late("reaches beyond its allocation");
    OK(copy(queue, host, out, OVLM_TO_DEVICE));
    expect_late("copy: to, 16 bytes at");
    small gone = small_new();
    OK(scale(queue, &gone));
    small_free(&gone); /* before the queue came to it */
    expect_late("was freed before the queue came to it");
    int32_t *label;
    void *memory;
    OK(device->ops->alloc(device, 64, &memory, &err));
    label = memory;
    ovlm_head head = {.label = label, .logp = s.y};
    head.x = ovlm_tensor_of(s.x, 1, 4, OVLM_F32);
    head.w = ovlm_tensor_of(s.x, 1, 4, OVLM_F32);
    OK(device->ops->head.fwd(queue, &head, &err));
    expect_late("head forward: scratch.work is NULL");
    CHECK(scale(queue, &(small){.args = {.alpha = 1}}) == OVLM_E_ARG, "refused at once");
    CHECK(copy(queue, NULL, host, OVLM_TO_DEVICE) == OVLM_E_ARG, "%s", err.message);
    device->ops->free(device, memory);
    small_free(&s);
}

static void test_poison(void)
{
    small s = small_new();
    uint8_t out[16] = {0};
    OK(copy(queue, out, s.x, OVLM_TO_HOST));
    OK(device->ops->queue_wait(queue, &err));
    for (int i = 0; i < 16; i++) {
        CHECK(out[i] == 0xff, "fresh memory is not poisoned");
    }
    OK(device->ops->fill(queue, s.x, 7, 16, &err));
    OK(copy(queue, out, s.x, OVLM_TO_HOST));
    OK(device->ops->queue_wait(queue, &err));
    CHECK(out[15] == 7, "fill");
    small_free(&s);
}

static sigjmp_buf escape;

static void on_fault(int number)
{
    siglongjmp(escape, number);
}

/* Host code that touches device memory is caught in the act. */
static void test_unreadable(void)
{
    small s = small_new();
    struct sigaction action = {0}, segv, bus;
    volatile float value = 0;
    volatile bool caught = false;
    action.sa_handler = on_fault;
    sigaction(SIGSEGV, &action, &segv);
    sigaction(SIGBUS, &action, &bus);
    for (volatile int i = 0; i < 2; i++) {
        caught = false;
        if (sigsetjmp(escape, 1) != 0) {
            caught = true;
        } else if (i == 0) {
            value = *(volatile float *)s.x;
        } else {
            *(volatile float *)s.x = value;
        }
        CHECK(caught, "device memory can be %s", i == 0 ? "read" : "written");
    }
    sigaction(SIGSEGV, &segv, NULL);
    sigaction(SIGBUS, &bus, NULL);
    small_free(&s);
}

/* Host mirrors and lists may die after the call. */
static void test_host_arrays_are_copied(void)
{
    void *memory, *stats_memory;
    OK(device->ops->alloc(device, 64, &memory, &err));
    OK(device->ops->alloc(device, sizeof(ovlm_grad_stats), &stats_memory, &err));
    float in[4] = {3, 4, 0, 0};
    ovlm_grad_stats stats = {0};
    ovlm_tensor grad = ovlm_tensor_of(memory, 1, 4, OVLM_F32);
    ovlm_grad_norm args = {.n = 1, .grad = &grad, .stats = stats_memory};
    ovlm_async_hold(queue, true);
    OK(copy(queue, memory, in, OVLM_TO_DEVICE));
    OK(device->ops->fill(queue, stats_memory, 0, sizeof stats, &err));
    OK(device->ops->grad_norm.fwd(queue, &args, &err));
    memset(&grad, 0xee, sizeof grad);
    OK(device->ops->copy(queue, &stats, stats_memory, sizeof stats, OVLM_TO_HOST, &err));
    OK(device->ops->queue_wait(queue, &err));
    CHECK(stats.norm_sq == 25, "norm %g", stats.norm_sq);
    device->ops->free(device, memory);
    device->ops->free(device, stats_memory);
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    ovlm_backend_options options = {.threads = 1};
    OK(ovlm_async_open(&ovlm_ref_ops, &options, &device, &err));
    OK(device->ops->queue_open(device, &queue, &err));
    test_late();
    test_lazy();
    test_events_order_queues();
    test_misuse();
    test_poison();
    test_unreadable();
    test_host_arrays_are_copied();
    test_two_threads();
    test_same_as_inner(&ovlm_ref_ops, 12, 9);
    test_same_as_inner(&ovlm_cpu_ops, 20, 30);
    test_checked(6);
    device->ops->queue_close(queue);
    device->ops->close(device);
    return test_end("ops_async");
}
