// Shifts the wall clock of a process by the nanoseconds in the file $CHAOS_CLOCK, which may change at any time.
// Preloaded with LD_PRELOAD. The monotonic clock stays. Waits with an absolute wall-clock deadline are shifted back,
// because the kernel compares them with the real clock.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *offset_ns = NULL;
static const int64_t BILLION = 1000000000;
static const int64_t WALL_CLOCK_S = 1000000000;  // seconds since 1970 are above it, seconds since boot below

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("CHAOS_CLOCK");
    int file = path == NULL ? -1 : open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return;
    void *memory = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
    if (memory != MAP_FAILED) offset_ns = memory;
    close(file);
}

static void shift(struct timespec *t, int64_t by_ns) {
    int64_t total = (int64_t)t->tv_sec * BILLION + t->tv_nsec + by_ns;
    t->tv_sec = total / BILLION;
    t->tv_nsec = total % BILLION;
}

static int64_t offset(void) { return offset_ns == NULL ? 0 : *offset_ns; }

int clock_gettime(clockid_t clock, struct timespec *t) {
    int status = (int)syscall(SYS_clock_gettime, clock, t);
    if (status == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) shift(t, offset());
    return status;
}

int gettimeofday(struct timeval *restrict t, void *restrict zone) {
    (void)zone;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec;
    t->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result != NULL) *result = now.tv_sec;
    return now.tv_sec;
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict deadline) {
    static int (*next)(sem_t *, const struct timespec *) = NULL;
    if (next == NULL) next = dlsym(RTLD_NEXT, "sem_timedwait");
    struct timespec real = *deadline;
    shift(&real, -offset());
    return next(semaphore, &real);
}

int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict deadline) {
    static int (*next)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *) = NULL;
    if (next == NULL) next = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    if (next == NULL) next = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    struct timespec real = *deadline;
    if (real.tv_sec > WALL_CLOCK_S) shift(&real, -offset());
    return next(condition, mutex, &real);
}
