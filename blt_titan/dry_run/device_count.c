/* Says how many CUDA devices there are, in place of torch's own answer: loaded before torch (LD_PRELOAD).

   Autograd asks for the streams of every device once torch counts at least one. The count begins at 0, because torch
   must register its guard for machines without a device; `dry_run_set_device_count` raises it afterwards. */
static int count = 0;

void dry_run_set_device_count(int wanted) { count = wanted; }

/* c10::cuda::device_count() */
signed char _ZN3c104cuda12device_countEv(void) { return (signed char)count; }
