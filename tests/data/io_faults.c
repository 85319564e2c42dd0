/* Preloaded into a process: the n-th operation that changes a file below a folder fails, or kills the process.

   arm(folder, n, fault, lasting): fault is an errno, or -1 to kill, half a write done. A lasting fault also meets all
   later operations that take room. n = 0 only counts; counted() says how many there were. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define SECTOR 512 /* bytes; a disk writes a sector or doesn't */

static char root[PATH_MAX];
static long count, position;
static int fault, lasting;

void arm(const char *folder, long n, int which, int stays) {
  strncpy(root, folder, sizeof root - 1);
  count = 0, position = n, fault = which, lasting = stays;
}

long counted(void) { return count; }

static int below(const char *path) {
  char whole[2 * PATH_MAX] = "";
  if (!*root) return 0;
  if (*path != '/' && getcwd(whole, PATH_MAX)) strcat(whole, "/");
  strncat(whole, path, PATH_MAX - 1);
  return !strncmp(whole, root, strlen(root));
}

static int is_below(int file) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t size = *root ? readlink(link, path, sizeof path - 1) : -1;
  path[size < 0 ? 0 : size] = 0;
  return size > 0 && below(path);
}

/* Say whether an operation fails; a kill that is to tear a write is left to the caller. */
static int fails(int takes_room, int torn) {
  long now = __sync_add_and_fetch(&count, 1);
  if (!position || now < position || (now > position && !(lasting && takes_room))) return 0;
  if (fault < 0 && !torn) kill(getpid(), SIGKILL), pause();
  errno = fault;
  return 1;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)
#define CHANGES(flags) ((flags) & (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC))
#define MODE mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { \
  va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); }
#define OPEN(name) int name(const char *path, int flags, ...) { REAL(name); MODE \
  return CHANGES(flags) && below(path) && fails(flags & O_CREAT, 0) ? -1 : real(path, flags, mode); }
#define OPENAT(name) int name(int at, const char *path, int flags, ...) { REAL(name); MODE \
  return CHANGES(flags) && below(path) && fails(flags & O_CREAT, 0) ? -1 : real(at, path, flags, mode); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

ssize_t write(int file, const void *data, size_t size) {
  REAL(write);
  if (!is_below(file) || !fails(1, 1)) return real(file, data, size);
  if (fault < 0) real(file, data, size / 2 / SECTOR * SECTOR), kill(getpid(), SIGKILL), pause();
  return -1;
}

int rename(const char *from, const char *to) { REAL(rename); return below(to) && fails(0, 0) ? -1 : real(from, to); }
int unlink(const char *path) { REAL(unlink); return below(path) && fails(0, 0) ? -1 : real(path); }
int rmdir(const char *path) { REAL(rmdir); return below(path) && fails(0, 0) ? -1 : real(path); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); return below(path) && fails(1, 0) ? -1 : real(path, mode); }
int fsync(int file) { REAL(fsync); return is_below(file) && fails(1, 0) ? -1 : real(file); }
int ftruncate64(int file, off64_t size) { REAL(ftruncate64); return is_below(file) && fails(1, 0) ? -1 : real(file, size); }
int posix_fallocate64(int file, off64_t from, off64_t size) {
  REAL(posix_fallocate64);
  return is_below(file) && fails(1, 0) ? errno : real(file, from, size);
}
