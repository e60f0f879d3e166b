/* A line between two processes of one machine: a few buffers in memory that both map, and two counters.
 *
 * The sender copies a message into the next free buffer and counts it as sent; the receiver reads it where it lies and
 * counts it as taken. Each sleeps on the other's counter (futex), so that who waits costs nothing. Loaded with ctypes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PUBLIC __attribute__((visibility("default")))
#define LOOKS 200 /* at the counter before it sleeps: shorter than falling asleep and being woken */

typedef struct {
    _Alignas(64) _Atomic uint32_t sent;
    _Alignas(64) _Atomic uint32_t taken;
    _Alignas(64) unsigned char buffers[];
} Line;

static void wake(_Atomic uint32_t *counter) { syscall(SYS_futex, counter, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0); }

/* Bytes before the first buffer; what the caller checks the library by. */
PUBLIC int64_t moe_line_head(void) { return (int64_t)sizeof(Line); }

/* One message: `num_head` bytes, then `num_body`. There must be a free buffer. */
PUBLIC void moe_line_send(Line *line, int64_t num_bytes, int64_t depth, const void *head, int64_t num_head,
                          const void *body, int64_t num_body) {
    uint32_t sent = atomic_load_explicit(&line->sent, memory_order_relaxed);
    unsigned char *buffer = line->buffers + (int64_t)(sent % (uint32_t)depth) * num_bytes;
    memcpy(buffer, head, (size_t)num_head);
    memcpy(buffer + num_head, body, (size_t)num_body);
    atomic_store_explicit(&line->sent, sent + 1, memory_order_release);
    wake(&line->sent);
}

/* The buffer of the oldest message may be written again. */
PUBLIC void moe_line_take(Line *line) {
    atomic_fetch_add_explicit(&line->taken, 1, memory_order_release);
    wake(&line->taken);
}

/* Whether the counter left `seen` within the time. */
static int64_t leaves(_Atomic uint32_t *counter, uint32_t seen, int64_t nanoseconds) {
    for (int look = 0; look < LOOKS; look++)
        if (atomic_load_explicit(counter, memory_order_acquire) != seen) return 1;
    struct timespec limit = {nanoseconds / 1000000000, nanoseconds % 1000000000};
    syscall(SYS_futex, counter, FUTEX_WAIT, seen, &limit, NULL, 0);
    return atomic_load_explicit(counter, memory_order_acquire) != seen;
}

/* 1 when a message is there within the time, else 0. */
PUBLIC int64_t moe_line_await_message(Line *line, int64_t nanoseconds) {
    uint32_t taken = atomic_load_explicit(&line->taken, memory_order_relaxed);
    return leaves(&line->sent, taken, nanoseconds);
}

/* 1 when a buffer is free within the time, else 0. */
PUBLIC int64_t moe_line_await_room(Line *line, int64_t depth, int64_t nanoseconds) {
    uint32_t sent = atomic_load_explicit(&line->sent, memory_order_relaxed);
    uint32_t full = sent - (uint32_t)depth;
    return leaves(&line->taken, full, nanoseconds);
}

/* Ends the present sleep of whoever waits on this line; it looks around and may sleep again. */
PUBLIC void moe_line_rouse(Line *line) {
    wake(&line->sent);
    wake(&line->taken);
}

/* Marks byte `place` of the file as this process's for as long as it lives (a lock that its end gives up). 0, or errno. */
PUBLIC int64_t moe_line_live(int64_t file, int64_t place) {
    struct flock own = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = place, .l_len = 1};
    return fcntl((int)file, F_SETLK, &own) == 0 ? 0 : errno;
}

/* Whether another process has marked `place`. */
PUBLIC int64_t moe_line_is_alive(int64_t file, int64_t place) {
    struct flock other = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = place, .l_len = 1};
    return fcntl((int)file, F_GETLK, &other) == 0 && other.l_type != F_UNLCK;
}
