/* The threads that a call works with: they wait for each other some ten times a layer. */

#ifndef MOE_CPU_TEAM_H
#define MOE_CPU_TEAM_H

#include <stdint.h>

struct team;

struct member { /* one thread of a piece of work */
    struct team *team;
    int64_t thread, threads;
};

typedef void moe_work(void *arg, const struct member *me);

/* `work` on so many threads, the calling one among them, which returns when all have. Threads belong to the thread that
 * calls; work must not call this again. 0: done; -1: the system gives no memory or no thread for it. */
int64_t moe_together(int64_t threads, moe_work *work, void *arg);

/* Returns when all threads of this work have called it. */
void moe_meet(const struct member *me);

/* `some` for ranges [from, to) that make up [0, total), each of at_once but the last; a single one does not call up
 * threads. 0: done; -1: as above. */
int64_t moe_for_each(int64_t threads, int64_t total, int64_t at_once, void (*some)(void *arg, int64_t from, int64_t to),
                     void *arg);

#endif
