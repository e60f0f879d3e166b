/* How an annealer cools: temperature and severity of penalties fall geometrically with the share of iterations done, and
 * how many iterations there are in all may be asked while it runs (deadline.py), so that a limit on time shortens the
 * schedule instead of cutting it. Where nobody shortens it the course depends on the iterations alone.
 */
#include <math.h>
#include <stdint.h>

typedef struct {
    int64_t iterations, pieces;                    /* severity changes between pieces */
    double first, last, first_severity, last_severity; /* temperatures in rank visits; factors of the penalties */
    int64_t (*ask)(int64_t done);                  /* iterations in all, or NULL */
} Schedule;

typedef struct {
    double temperature, cooling, severity;
    int64_t total, every; /* iterations between two looks */
} Pace;

/* `work`: of one iteration, about nanoseconds. */
static inline Pace paced(const Schedule *s, int64_t work) {
    int64_t every = 1000000 / (work + 1), most = s->iterations / (s->pieces ? s->pieces : 1);
    every = every < most ? every : most;
    return (Pace){s->first, 1, s->first_severity, s->iterations, every ? every : 1};
}

static inline void look(const Schedule *s, int64_t done, Pace *pace) {
    if (s->ask) {
        int64_t allowed = s->ask(done);
        pace->total = allowed < s->iterations ? allowed : s->iterations;
    }
    if (done >= pace->total) return;
    double total = (double)pace->total, ratio = s->last / s->first, hard = s->last_severity / s->first_severity;
    pace->temperature = s->first * pow(ratio, (double)done / total);
    pace->cooling = pow(ratio, 1 / total);
    pace->severity = s->first_severity * pow(hard, (double)(done * s->pieces / pace->total + 1) / (double)s->pieces);
}
