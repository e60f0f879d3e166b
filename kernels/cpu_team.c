/* A team of threads that wait for each other awake while that has lately sufficed, and asleep otherwise.
 *
 * A thread that sleeps is called up in 30 to 60 us, as long as a small matrix takes. One that spins beside another busy
 * process keeps a core from the very thread it waits for: steps 3 to 50 times as long. So a wait spins for AWAKE_NS,
 * longer than calling up another thread may take, or two that once slept would go on sleeping for each other. A thread that
 * spun in vain twice running sleeps at once in its next two waits, then in the next six, fourteen, …, and in half as
 * many after each wait in which spinning sufficed.
 */

#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

#include "cpu_team.h"

enum { AWAKE_NS = 200000, MOST_ASLEEP = 255, LINE = 64 };

struct waiter { /* how a thread waits */
    _Alignas(LINE) int64_t asleep, left; /* waits to sleep at once after the last failure, and how many are left */
};

struct count { /* what threads wait for to change, on a line of its own */
    _Alignas(LINE) uint32_t value;
    uint32_t sleepers;
};

struct seat { /* of one thread; nobody is called up for what others do */
    struct count jobs; /* begun, that it takes part in */
    struct waiter waiter;
    pthread_t worker; /* but of the thread that calls */
};

struct team {
    struct count meetings;          /* over */
    _Alignas(LINE) int64_t arrived; /* at this meeting */
    moe_work *work;                 /* NULL: the end */
    void *arg;
    int64_t threads; /* that work */
    int64_t size;    /* threads that there are, the one that calls included */
    struct seat seats[];
};

static pthread_key_t team_key;
static pthread_once_t team_once = PTHREAD_ONCE_INIT;

/* ---- waiting ---- */

static int64_t nanoseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

static int is_still(const struct count *c, uint32_t value) {
    return __atomic_load_n(&c->value, __ATOMIC_SEQ_CST) == value;
}

static int spin(const struct count *c, uint32_t value) {
    for (int64_t end = 0;;) {
        for (int i = 0; i < 32; i++) {
            if (!is_still(c, value)) return 1;
            pause_briefly();
        }
        int64_t now = nanoseconds();
        if (!end) end = now + AWAKE_NS;
        if (now > end) return 0;
    }
}

/* Until c is no longer `value`. */
static void await(struct count *c, uint32_t value, struct waiter *w) {
    if (w->left) {
        w->left--;
    } else if (spin(c, value)) {
        w->asleep /= 2;
        return;
    } else {
        w->asleep = w->asleep < MOST_ASLEEP ? 2 * w->asleep + 1 : MOST_ASLEEP;
        w->left = w->asleep - 1;
    }
    __atomic_fetch_add(&c->sleepers, 1, __ATOMIC_SEQ_CST); /* before the value is asked for: see `change` */
    while (is_still(c, value))
#ifdef __linux__
        syscall(SYS_futex, &c->value, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
#else
        nanosleep(&(struct timespec){0, 50000}, NULL);
#endif
    __atomic_fetch_sub(&c->sleepers, 1, __ATOMIC_SEQ_CST);
}

static void change(struct count *c, uint32_t to) {
    __atomic_store_n(&c->value, to, __ATOMIC_SEQ_CST);
#ifdef __linux__
    if (__atomic_load_n(&c->sleepers, __ATOMIC_SEQ_CST))
        syscall(SYS_futex, &c->value, FUTEX_WAKE_PRIVATE, 1 << 30, NULL, NULL, 0);
#endif
}

void moe_meet(const struct member *me) {
    struct team *t = me->team;
    if (me->threads == 1) return;
    uint32_t meeting = __atomic_load_n(&t->meetings.value, __ATOMIC_SEQ_CST);
    if (__atomic_add_fetch(&t->arrived, 1, __ATOMIC_SEQ_CST) < me->threads) {
        await(&t->meetings, meeting, &t->seats[me->thread].waiter);
        return;
    }
    t->arrived = 0;
    change(&t->meetings, meeting + 1);
}

/* ---- threads ---- */

static void begin(struct team *t, int64_t threads, moe_work *work, void *arg) {
    t->work = work, t->arg = arg, t->threads = threads;
    for (struct seat *s = t->seats + 1; s < t->seats + threads; s++) change(&s->jobs, s->jobs.value + 1);
}

static void *serve(void *of_new) {
    struct member me = *(struct member *)of_new;
    struct team *t = me.team;
    struct seat *s = t->seats + me.thread;
    free(of_new);
#ifdef __linux__
    pthread_setname_np(pthread_self(), "moe-team");
#endif
    for (uint32_t job = 0;; job++) { /* the next begins only when all have met after this one */
        await(&s->jobs, job, &s->waiter);
        if (!t->work) return NULL;
        me.threads = t->threads;
        t->work(t->arg, &me);
        moe_meet(&me);
    }
}

static void end(void *of_thread) {
    struct team *t = of_thread;
    begin(t, t->size, NULL, NULL);
    for (int64_t i = 1; i < t->size; i++) pthread_join(t->seats[i].worker, NULL);
    free(t);
}

static int add_worker(struct team *t) {
    struct member *me = malloc(sizeof *me);
    if (!me) return -1;
    *me = (struct member){t, t->size, 0};
    if (pthread_create(&t->seats[t->size].worker, NULL, serve, me)) {
        free(me);
        return -1;
    }
    t->size++;
    return 0;
}

static struct team *create(int64_t size) {
    size_t bytes = sizeof(struct team) + (size_t)size * sizeof(struct seat); /* whole lines */
    struct team *t = aligned_alloc(LINE, bytes);
    if (!t) return NULL;
    memset(t, 0, bytes);
    t->size = 1;
    sigset_t all, before; /* signals are for the program's own threads */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (t->size < size && !add_worker(t)) {}
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (t->size == size) return t;
    end(t);
    return NULL;
}

static void forget(void) { pthread_setspecific(team_key, NULL); } /* a forked child has none of the threads */

static void create_key(void) {
    pthread_key_create(&team_key, end);
    pthread_atfork(NULL, NULL, forget);
}

int64_t moe_together(int64_t threads, moe_work *work, void *arg) {
    struct member me = {NULL, 0, threads};
    if (threads > 1) {
        pthread_once(&team_once, create_key);
        me.team = pthread_getspecific(team_key);
        if (me.team && me.team->size < threads) {
            pthread_setspecific(team_key, NULL);
            end(me.team), me.team = NULL;
        }
        if (!me.team) {
            if (!(me.team = create(threads))) return -1;
            pthread_setspecific(team_key, me.team);
        }
        begin(me.team, threads, work, arg);
    }
    work(arg, &me);
    moe_meet(&me);
    return 0;
}

/* ---- ranges ---- */

struct ranges {
    int64_t total, at_once, next;
    void (*some)(void *arg, int64_t from, int64_t to);
    void *arg;
};

static void take_ranges(void *of_all, const struct member *me) {
    struct ranges *r = of_all;
    (void)me;
    for (int64_t from; (from = __atomic_fetch_add(&r->next, r->at_once, __ATOMIC_RELAXED)) < r->total;)
        r->some(r->arg, from, r->total - from < r->at_once ? r->total : from + r->at_once);
}

int64_t moe_for_each(int64_t threads, int64_t total, int64_t at_once, void (*some)(void *arg, int64_t from, int64_t to),
                     void *arg) {
    struct ranges ranges = {total, at_once, 0, some, arg};
    int64_t num = (total + at_once - 1) / at_once;
    return moe_together(num <= 1 ? 1 : num < threads ? num : threads, take_ranges, &ranges);
}
