// A cable between two network namespaces: every frame is held for a delay after it has left at a given rate.
//
//     delay_line NAMESPACE_A NAMESPACE_B INTERFACE BITS_PER_SECOND DELAY_NS
//
// Makes a tap device INTERFACE in each namespace, prints "ready" and forwards frames between them until it is killed.
// For kernels without the netem queue. Rate 0: none. Each way has its own rate and queue; a full queue drops the frame
// and says so on stderr, as a router would.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { QUEUE = 1 << 14, FRAME = 1 << 16 };

struct frame {
    int64_t due;
    int size;
    char *bytes;
};

struct way {
    int from, to;
    int64_t free_at;  // when the last frame has left
    unsigned head, tail;
    struct frame queue[QUEUE];
};

static void fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int tap_in(const char *namespace, const char *name) {
    char path[256];
    snprintf(path, sizeof path, "/var/run/netns/%s", namespace);
    int handle = open(path, O_RDONLY);
    if (handle < 0 || setns(handle, CLONE_NEWNET)) fail(path);
    close(handle);
    int tap = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
    if (tap < 0) fail("/dev/net/tun");
    struct ifreq request = {0};
    request.ifr_flags = IFF_TAP | IFF_NO_PI;
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", name);
    if (ioctl(tap, TUNSETIFF, &request)) fail("TUNSETIFF");
    return tap;
}

static void take(struct way *way, double ns_per_byte, int64_t delay) {
    static char buffer[FRAME];
    int size;
    while ((size = read(way->from, buffer, sizeof buffer)) > 0) {
        int64_t at = now();
        if (way->tail - way->head == QUEUE) {
            fprintf(stderr, "a frame was dropped: %d are waiting\n", QUEUE);
            continue;
        }
        way->free_at = (way->free_at > at ? way->free_at : at) + (int64_t)(size * ns_per_byte);
        struct frame *frame = &way->queue[way->tail++ % QUEUE];
        *frame = (struct frame){way->free_at + delay, size, malloc(size)};
        if (!frame->bytes) fail("malloc");
        memcpy(frame->bytes, buffer, size);
    }
    if (size < 0 && errno != EAGAIN && errno != EIO) fail("read");  // EIO: the interface is down
}

static int64_t deliver(struct way *way) {
    while (way->head != way->tail) {
        struct frame *frame = &way->queue[way->head % QUEUE];
        if (frame->due > now()) return frame->due;
        if (write(way->to, frame->bytes, frame->size) != frame->size && errno != EIO) fail("write");
        free(frame->bytes);
        way->head++;
    }
    return INT64_MAX;
}

int main(int argc, char **argv) {
    if (argc != 6) {
        fprintf(stderr, "usage: %s NAMESPACE_A NAMESPACE_B INTERFACE BITS_PER_SECOND DELAY_NS\n", argv[0]);
        return 2;
    }
    int a = tap_in(argv[1], argv[3]), b = tap_in(argv[2], argv[3]);
    double rate = atof(argv[4]), ns_per_byte = rate > 0 ? 8e9 / rate : 0;
    int64_t delay = atoll(argv[5]);
    static struct way ways[2];
    ways[0].from = ways[1].to = a;
    ways[1].from = ways[0].to = b;
    struct sched_param first = {.sched_priority = 1};
    if (sched_setscheduler(0, SCHED_FIFO, &first)) perror("real-time priority");  // the ranks keep all cores busy
    prctl(PR_SET_TIMERSLACK, 1);
    puts("ready");
    fflush(stdout);
    for (;;) {
        int64_t next = deliver(&ways[0]), other = deliver(&ways[1]);
        if (other < next) next = other;
        struct pollfd polled[2] = {{a, POLLIN, 0}, {b, POLLIN, 0}};
        int64_t wait = next == INT64_MAX ? 1000000000 : next - now();
        if (wait > 0) {
            struct timespec timeout = {wait / 1000000000, wait % 1000000000};
            if (ppoll(polled, 2, &timeout, NULL) < 0 && errno != EINTR) fail("ppoll");
        }
        take(&ways[0], ns_per_byte, delay);
        take(&ways[1], ns_per_byte, delay);
    }
}
